"""Gives a Trainer the finished model of a run that has been trained before."""

import math
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.manifest import Sealed
from outlast.errors import CheckpointError

from .deepspeed import load_weights
from .names import own_names

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Trainer


def load_into(trainer: "Trainer", model: "Path") -> None:
    """Load the weights of a checkpoint, or of the finished model, into the Trainer's.

    Raises:
        CheckpointError: it holds no weights that the Trainer knows how to load.
    """
    try:
        if trainer.is_deepspeed_enabled:
            load_weights(trainer, model)
        else:
            with own_names():
                trainer._load_from_checkpoint(str(model))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the weights in {model} can't be loaded: {error}") from None


def load(trainer: "Trainer", final: "Path", last: Sealed | None, step: int, metrics: dict[str, float]) -> Any:
    """Load `final` into the Trainer's model, and its state as it was at the end.

    Args:
        last: the checkpoint of the last step, if it is still there: it has the history of logs and evaluations.
        step: the last step.
        metrics: what training returned, as far as it is known.

    Returns:
        A `TrainOutput` as training returned it.

    Raises:
        CheckpointError: `final` holds no weights that the Trainer knows how to load.
    """
    from transformers import TrainerState
    from transformers.trainer_utils import TrainOutput

    load_into(trainer, final)
    if last is not None and (saved := last.path / "trainer_state.json").is_file():
        trainer.state = TrainerState.load_from_json(str(saved))
    trainer.state.global_step = step
    return TrainOutput(step, metrics.get("train_loss", math.nan), metrics)
