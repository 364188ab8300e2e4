"""Looks at each loss of a Trainer: one that is NaN or infinite is said at once.

A Trainer leaves such losses out of what it logs (`logging_nan_inf_filter`), so its logs alone would not tell.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from outlast.attempt.not_finite import NotFinite

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from outlast.attempt.attempt import RankAttempt


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Replaces `Trainer.training_step`. On a GPU the losses are read when one is logged or saved: that waits for it."""

    def __init__(self, run: "RankAttempt", trainer: "Trainer") -> None:
        self._warn, self._step = NotFinite(run), trainer.training_step
        self._last: torch.Tensor | None = None
        """The first loss that was no number, or the last loss."""
        trainer.training_step = self.training_step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Replace the Trainer's method, to see its result: the loss of a micro-batch."""
        loss: torch.Tensor = self._step(*args, **kwargs)
        seen = loss.detach()
        self._last = seen if self._last is None else torch.where(torch.isfinite(self._last), seen, self._last)
        return loss

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        if self._last is not None and (self._last.device.type == "cpu" or control.should_log or control.should_save):
            self._warn.look(state.global_step, {"the loss": self._last.float().mean().item()})
            self._last = None

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        losses = {name: value for name, value in (logs or {}).items() if "loss" in name or name == "grad_norm"}
        self._warn.look(state.global_step, losses)
