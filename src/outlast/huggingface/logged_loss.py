"""Has the losses that a Trainer logs cover the steps that they would without an interruption.

A Trainer sums losses between two logs, and for the mean over training (`train_loss`), in attributes that its own
checkpoint leaves out: after a resume both began anew, and so did the time of training, and with it the tokens a second.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from outlast import clock

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

KEPT = "outlast.loss"
"""The name under which a run keeps this state."""


class LoggedLoss(TrainerCallback):  # type: ignore[misc]
    """The sums of one rank: one of the run's kept objects."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer, self._finalize = trainer, trainer._finalize_training
        self._seconds_before, self._began = 0.0, clock.now()
        self._at_step_begin: torch.Tensor | None = None
        trainer._finalize_training = self.finalize
        self._log, trainer.log = trainer.log, self.log

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, the steps that they begin with, and the seconds of training, as of now."""
        trainer = self._trainer
        began = not hasattr(trainer, "_tr_loss")  # before training: there is nothing yet
        return {
            "loss": 0.0 if began else trainer._tr_loss.item(),
            "total": 0.0 if began else trainer._total_loss_scalar,
            "logged_at": 0 if began else trainer._globalstep_last_logged,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned, in an attempt before this one or earlier in it."""
        trainer = self._trainer
        trainer._tr_loss.fill_(state["loss"])  # in place: the training loop holds it too
        trainer._total_loss_scalar, trainer._globalstep_last_logged = state["total"], state["logged_at"]
        trainer._initial_global_step = trainer._initial_num_input_tokens_seen = 0
        self._seconds_before, self._began = state["seconds"], clock.now()

    def on_train_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self._began = clock.now()  # loading and the trackers' start don't count

    def on_step_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        if args.gradient_accumulation_steps > 1:
            self._at_step_begin = self._trainer._tr_loss.clone()  # on its device: reading it would wait for the GPU

    def go_back(self) -> None:
        """Leave out the micro-batches of the step that is not done."""
        if self._at_step_begin is not None:
            self._trainer._tr_loss.copy_(self._at_step_begin)

    def finalize(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Replace `Trainer._finalize_training`: the time is that of all attempts, as the steps are."""
        return self._finalize(trial, num_train_samples, time.time() - self._seconds())

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Replace `Trainer.log`, which divides by the time of training what was trained in all attempts."""
        self._log(logs, None if start_time is None else time.time() - self._seconds())

    def _seconds(self) -> float:
        """How long all attempts have trained, in seconds."""
        return self._seconds_before + clock.now() - self._began
