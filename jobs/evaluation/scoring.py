"""Scores checkpoints on evaluation data, with the Trainer of `job=sft`: its model, its collator, its loss."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpoint import digests
from outlast.checkpoint.listing import LISTING
from outlast.checkpoint.manifest import Sealed
from outlast.config.configuration import Config
from outlast.config.data import JsonlData
from outlast.errors import CheckpointError, ConfigError
from outlast.huggingface.finished import load_into
from outlast.huggingface.frozen_weights import shortened
from outlast.huggingface.loaded import different
from outlast.rundir.directory import RunDirectory

from ..training import data, models, prepared, trainer_arguments


class Scorer:
    """A Trainer that is given one checkpoint's weights after the other, on one process.

    Args:
        file: JSON Lines to score on; None: the evaluation data that the run has prepared.
        scratch: where transformers may write.

    Attributes:
        data: digest of the data, and of how it is scored: only what has the same is compared row by row.

    Raises:
        ConfigError: there is no such data.
        OutlastError: the data or the base model can't be loaded.
    """

    def __init__(self, run: RunDirectory, config: Config, file: Path | None, scratch: Path) -> None:
        import datasets
        from transformers.utils import logging
        from trl import SFTTrainer

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
        tokenized, base = run.prepared / "data", run.prepared / "model"
        prepared.verify(run)
        quiet = {"report_to": "none", "eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no"}
        args = trainer_arguments.sft_config(config, scratch, **quiet, ddp_backend=None)
        rows: Any
        if file is None:
            found = prepared.load(tokenized)
            rows = found[1] if found else None
            if rows is None:
                raise ConfigError(
                    "RUN", run.path.name, "it has prepared no evaluation data; valid: with --data FILE.jsonl"
                )
            prepared.reuse(args)
            listing = tokenized / LISTING
            self.name, digest = "eval", _digest(listing if listing.is_file() else tokenized / "prepared.json")
        else:
            try:
                rows, _ = data.load(replace(config, data=JsonlData(train=str(file))))
            except ConfigError as error:
                if error.key != "data.train":
                    raise
                raise ConfigError("--data", error.value, str(error).partition(" is refused; ")[2]) from None
            args.packing = args.eval_packing = False  # the more rows, the better a difference is told from noise
            digest = _digest(file)
            self.name = f"{file.stem}-{digest[:8]}"
        model, tokenizer = models.load(config, base)
        self._trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=models.peft_config(config),
        )
        self._batch, self.rows = args.per_device_eval_batch_size, len(rows)
        how = f"{self._batch} {args.device.type} {args.bf16} {args.fp16} {model.dtype}"
        self.data = xxhash.xxh3_64(f"{digest} {how}".encode()).hexdigest()

    def score(self, checkpoint: Sealed, poll: Callable[[int, int], None]) -> list[float]:
        """Each row's share of the evaluation loss (see `results/evaluations.py`).

        Args:
            poll: called before each row, with its number and how many there are; may raise.

        Raises:
            CheckpointError: not all of its weights could be loaded.
        """
        import torch

        trainer = self._trainer
        load_into(trainer, checkpoint.path)
        self._compare(checkpoint)
        trainer.model.eval()
        sums, tokens, rows = list[float](), list[int](), trainer.train_dataset
        for number in range(len(rows)):
            poll(number, len(rows))
            batch = trainer._prepare_inputs(trainer.data_collator([rows[number]]))
            count = int((batch["labels"][..., 1:] != -100).sum())
            with torch.inference_mode(), trainer.compute_loss_context_manager():
                loss = float(trainer.compute_loss(trainer.model, batch)) if count else 0.0
            sums.append(loss * count)
            tokens.append(count)
        return [
            share
            for start in range(0, len(sums), self._batch)
            for share in _shares(sums[start : start + self._batch], tokens[start : start + self._batch])
        ]

    def _compare(self, checkpoint: Sealed) -> None:
        """Compare what was loaded with what was in memory when it was saved, where the checkpoint knows that."""
        if wrong := different(self._trainer.model, digests.read(checkpoint.path, 0)):
            raise CheckpointError(f"what was loaded is not what was saved: {shortened(wrong)}")


def _shares(sums: list[float], tokens: list[int]) -> list[float]:
    """The rows' shares of one batch's part of the loss."""
    factor = len(sums) / max(sum(tokens), 1)
    return [value * factor for value in sums]


def mean(losses: list[float]) -> float:
    """The evaluation loss."""
    return math.fsum(losses) / len(losses)


def _digest(file: Path) -> str:
    return xxhash.xxh3_64(file.read_bytes()).hexdigest()
