"""Has the finished model be the one that is to be used, where an optimizer trains other weights than those.

A schedule-free optimizer (https://arxiv.org/abs/2405.15682) takes its gradients at weights between those that it
averages and those that it steps; `eval()` puts the average into the model, `train()` the others. The Trainer calls
`eval()` for an evaluation only, so that a run that ends without one leaves the wrong weights in the model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outlast.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import Trainer


def put_into_use(trainer: "Trainer", best: Path | None = None) -> None:
    """Put the weights that are to be used into the Trainer's model; nothing, with most optimizers.

    Args:
        best: the checkpoint whose weights were loaded at the end of training, if any: what its optimizer then averaged
            is in its state.

    Raises:
        CheckpointError: `best` was saved between two evaluations, and its optimizer's state is no longer there.
    """
    optimizer = _with_modes(trainer.optimizer)
    if optimizer is None:
        return
    if best is not None:
        saved = best / "optimizer.pt"
        if not saved.is_file():
            raise CheckpointError(f"{best}: without its optimizer's state, its weights to be used can't be told")
        optimizer.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
    optimizer.eval()


def _with_modes(optimizer: Any) -> Any:
    """The optimizer in its wrappers that has a mode for training and one for use."""
    while optimizer is not None:
        if not hasattr(optimizer, "accelerator_state") and all(
            callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")
        ):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None
