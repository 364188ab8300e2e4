"""Says what a Trainer's run is, as far as its checkpoints depend on it."""

from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from outlast.checkpoint.compatibility import dataset_digest, trainable_digest
from outlast.checkpoint.strangers import made_by_a_trainer

if TYPE_CHECKING:
    from transformers import Trainer

    from outlast.attempt.attempt import RankAttempt

SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha"),
)
"""Arguments of a Trainer that decide its steps; what has changed of them since a checkpoint is named."""


def describe(run: "RankAttempt", trainer: "Trainer") -> None:
    """Tell `run` what `trainer` trains, with what, and how far."""
    args, passed = trainer.args, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    settings = {name: getattr(args, name, None) for name in SETTINGS}
    run.describe(
        seed=args.seed if args.data_seed is None else args.data_seed,
        micro_batch=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        dataset=dataset_digest(trainer.train_dataset) or _rows(trainer.train_dataset),
        trainable=trainable_digest(trainer.model),
        length=f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        settings={name: value if type(value) in (int, float) else str(value) for name, value in settings.items()}
        | {"optimizer": type(passed).__name__ if passed is not None else str(args.optim)},
    )


def _rows(data: Any) -> str | None:
    """The length of a dataset whose rows can't be read; None for a stream."""
    return f"of {len(data)} rows" if isinstance(data, Sized) and not isinstance(data, IterableDataset) else None


def warn_of_others(run: "RankAttempt", output: Path) -> None:
    """Say that a new run does not go on from what a Trainer has left in its own output directory."""
    found = made_by_a_trainer(output)
    if found and output.absolute() not in (run.directory.path, run.directory.checkpoints):
        path = max(found)[1]
        run.say(
            f"WARNING: this run begins at step 0. {path}, which a Trainer has made without it, is not gone on from; "
            f"to begin with its weights, load them into the model: from_pretrained({str(path)!r})"
        )
