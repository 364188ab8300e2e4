"""Leaves in the middle of gradient accumulation if there is no time to finish the optimizer step.

Until its last micro-batch, a step has changed nothing but the random numbers and what the Trainer's class counts:
weights, optimizer and schedule are those of the previous step. So the previous step can still be saved exactly, with
the random state from its end, and a few micro-batches are lost instead of all steps since the last checkpoint.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from . import random_state
from .own_state import OwnState

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from outlast.attempt.attempt import RankAttempt


class Accumulation(TrainerCallback):  # type: ignore[misc]
    """Checks between micro-batches whether the ranks have agreed to stop.

    Args:
        own: the state that the Trainer keeps in attributes of its own.
        save: saves the current state as that of the last step, and leaves.
    """

    def __init__(self, run: "RankAttempt", trainer: "Trainer", own: OwnState, save: Callable[[], None]) -> None:
        self._run, self._trainer, self._own, self._save = run, trainer, own, save
        self._random: dict[str, Any] = {}
        self._tokens_seen: Any = 0
        self._done = 0

    def keep(self) -> None:
        """Keep the random state: it is that of the last step's end, as the next attempt would load it."""
        if self._trainer.args.gradient_accumulation_steps > 1:
            self._random, self._tokens_seen = random_state.capture(), self._trainer.state.num_input_tokens_seen
            self._own.keep()

    def on_epoch_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.keep()  # a resumed epoch begins with this state, and then draws the order of its samples

    def on_step_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self._done = 0
        if not float(state.epoch or 0).is_integer():
            self.keep()

    def on_substep_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self._done += 1
        left = getattr(self._trainer, "current_gradient_accumulation_steps", 0) - self._done
        if not self._run.steps.should_stop(state.global_step) or self._run.steps.time_for("step", left) is not False:
            return
        if state.global_step > 0 and not self._own.go_back():
            return
        self._run.record("step_cut", step=state.global_step + 1, micro_batches=self._done)
        self._run.say(
            f"no time to finish step {state.global_step + 1}: its {self._done} micro-batches will be made again"
        )
        if state.global_step == 0:
            self._run.leave(0)  # nothing to save: starting again gives the same run
        random_state.restore(self._random)
        state.num_input_tokens_seen = self._tokens_seen
        self._save()
