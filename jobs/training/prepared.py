"""Keeps the tokenized and packed datasets of an `SFTTrainer`, which every later attempt reads.

A directory is published by one rename of a staging directory whose files are flushed, so it is complete or absent.
The trainer of a later attempt is built from what is read here and must not prepare it again (see :func:`reuse`);
the batches, and so the weights, are those of a trainer built from the raw data.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.listing import check_listing, write_listing
from outlast.errors import CheckpointError, ResumeRefusedError
from outlast.files import staged_directory
from outlast.rundir import ancestry
from outlast.rundir.directory import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("input_ids", "labels", "seq_lengths")
"""The columns of a prepared row that TRL's collator reads; the raw text is left behind."""


def size(train: "Dataset", evaluation: "Dataset | None") -> int:
    """The bytes that :func:`save` will write, but for the few that describe them."""
    kept = [_kept(split) for split in (train, evaluation) if split is not None]
    return sum(int(split.data.nbytes * len(split) / max(len(split.data), 1)) for split in kept)


def save(directory: Path, train: "Dataset", evaluation: "Dataset | None") -> None:
    """Keep a trainer's prepared datasets, `trainer.train_dataset` and `trainer.eval_dataset`; rank 0 alone calls it."""
    splits = {"train": train} | ({} if evaluation is None else {"eval": evaluation})
    with staged_directory(directory) as staging:
        for name, split in splits.items():
            _kept(split).save_to_disk(str(staging / name))
        (staging / "prepared.json").write_text(json.dumps({name: len(split) for name, split in splits.items()}))
        write_listing(staging)


def _kept(split: "Dataset") -> "Dataset":
    return split.select_columns([column for column in COLUMNS if column in split.column_names])


def verify(run: RunDirectory) -> None:
    """Compare the model and the data that were prepared with the lists of their files; what is not there is left out.

    Raises:
        ResumeRefusedError: a file is missing, or is not what was written.
    """
    for directory in filter(Path.is_dir, (run.prepared / "model", run.prepared / "data")):
        try:
            check_listing(directory)
        except CheckpointError as error:
            way_out = f"remove {directory if directory.name == 'data' else run.prepared}"
            way_out += ", and the same command prepares it again"
            if directory.name in ancestry.TAKEN_OVER and (made := ancestry.read(run)):
                way_out = begin_again(made)
            raise ResumeRefusedError(f"{directory} is not what was prepared: {error}; {way_out}") from None


def begin_again(made: ancestry.Ancestry) -> str:
    """The way out where what a run took over from another is lost."""
    options = " --optimizer" if made.optimizer else ""
    return f"it came with {made.words}: begin anew, outlast train --from {made.path}@{made.step}{options} run.name=…"


def load(directory: Path) -> "tuple[Dataset, Dataset | None] | None":
    """Load the prepared datasets, memory-mapped; None if they are missing or can't be read, so must be prepared again.

    With several ranks, let one of them decide and the others follow: a trainer that prepares waits for all ranks.
    """
    if not directory.is_dir():
        return None
    from datasets import load_from_disk

    try:
        rows = json.loads((directory / "prepared.json").read_text())
        splits = {name: load_from_disk(str(directory / name)) for name in rows}
        whole = "train" in rows and all(len(split) == rows[name] for name, split in splits.items())
    except (OSError, ValueError):  # Arrow's errors are among these
        return None
    return (splits["train"], splits.get("eval")) if whole else None


def reuse(arguments: Any) -> None:
    """Change an `SFTConfig` so that a trainer takes prepared datasets as they are.

    Without it TRL would truncate, pack and shuffle them a second time. `assistant_only_loss` has done its work in
    the labels; left on, TRL would look for the raw chat and refuse.
    """
    arguments.dataset_kwargs = {**(arguments.dataset_kwargs or {}), "skip_prepare_dataset": True}
    arguments.assistant_only_loss = False
