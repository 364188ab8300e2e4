"""Says what a Trainer's run is, as far as its checkpoints depend on it."""

from pathlib import Path
from typing import TYPE_CHECKING

from outlast.checkpoint.compatibility import dataset_digest, trainable_digest
from outlast.checkpoint.strangers import made_by_a_trainer

if TYPE_CHECKING:
    from transformers import Trainer

    from outlast.attempt.attempt import RankAttempt


def describe(run: "RankAttempt", trainer: "Trainer") -> None:
    """Tell `run` what `trainer` trains, with what, and how far."""
    args = trainer.args
    run.describe(
        seed=args.seed if args.data_seed is None else args.data_seed,
        micro_batch=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        dataset=dataset_digest(trainer.train_dataset),
        trainable=trainable_digest(trainer.model),
        length=f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
    )


def warn_of_others(run: "RankAttempt", output: Path) -> None:
    """Say that a new run does not go on from what a Trainer has left in its own output directory."""
    found = made_by_a_trainer(output)
    if found and output.absolute() not in (run.directory.path, run.directory.checkpoints):
        path = max(found)[1]
        run.say(
            f"WARNING: this run begins at step 0. {path}, which a Trainer has made without it, is not gone on from; "
            f"to begin with its weights, load them into the model: from_pretrained({str(path)!r})"
        )
