"""Looks at each loss of a Trainer: one that is NaN or infinite is said at once, and stops it.

A Trainer leaves such losses out of what it logs (`logging_nan_inf_filter`), so its logs alone would not tell.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from outlast.attempt.not_finite import NotFinite

from .finite_weights import are_finite

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from outlast.attempt.attempt import RankAttempt


KEPT = "outlast.guard"
"""The name under which a run keeps this state."""
READ_AT_ONCE = ("cpu",)
"""Kinds of device on which reading a loss waits for nothing."""


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Replaces `Trainer.training_step`. On a GPU a loss is read when one is logged or saved: that waits for it."""

    def __init__(self, run: "RankAttempt", trainer: "Trainer") -> None:
        self._run, self._trainer = run, trainer
        self._warn, self._step = NotFinite(run), trainer.training_step
        self._sum: torch.Tensor | None = None
        """The loss of the step under way: a micro-batch's is its share of it."""
        self._last: torch.Tensor | None = None
        """The first step's loss that was no number, or the last step's."""
        trainer.training_step = self.training_step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Replace the Trainer's method, to see its result: the loss of a micro-batch."""
        loss: torch.Tensor = self._step(*args, **kwargs)
        self._sum = loss.detach().clone() if self._sum is None else self._sum + loss.detach()
        return loss

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        if self._sum is not None:
            seen, self._sum = self._sum, None
            self._last = seen if self._last is None else torch.where(torch.isfinite(self._last), seen, self._last)
        if self._last is not None and (
            self._last.device.type in READ_AT_ONCE or control.should_log or control.should_save
        ):
            self.read(state.global_step)

    def read(self, step: int) -> None:
        """Look at what there is, by `step`; on a GPU this waits for it."""
        if self._last is not None:
            loss, self._last = self._last.float().mean().item(), None
            self._warn.look_at_loss(step, loss, lambda: are_finite(self._trainer.model.parameters()))

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that the next one is compared with."""
        return self._warn.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""
        self._warn.load_state_dict(state)

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
