"""What was decided at a checkpoint's step, and is still to be done there, survives the process that decided it.

Between two optimizer steps the Trainer may evaluate, end the epoch, evaluate again, and stop. A checkpoint may be made
before all of that is done. The next attempt does the rest first, with what the callbacks knew and had asked for, and
then goes on at the place in the data that the epoch recorded in the state says, not the step: an epoch can be ended
early.
"""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import has_length

from . import random_state
from .evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainingArguments

    from outlast.attempt.attempt import RankAttempt


class Decisions(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Records how far a step's decisions have been carried out, and carries out the rest after a resume.

    Args:
        determine_best: sees whether an evaluation's metrics are the best so far.
    """

    def __init__(
        self,
        run: "RankAttempt",
        trainer: "Trainer",
        evaluation: Evaluation,
        determine_best: Callable[[dict[str, float], Any], bool],
    ) -> None:
        self._run, self._trainer, self._evaluation = run, trainer, evaluation
        self._determine_best = determine_best
        self._epoch_ended = False
        """Whether `on_epoch_end` has been called since the last step's end."""
        self._stored: dict[str, Any] = {}
        self._history: list[dict[str, float]] = []
        self._stop_asked = self._epoch_stop_asked = False
        self._finished = False
        self._last_ended = -1
        """The last epoch that is over; one that the Trainer would go on with is skipped."""
        self._max_steps = self._batches_of_epoch = 0
        self.random_state: dict[str, Any] | None = None
        """The random state after what a resumed attempt has made up for; None if there was nothing."""
        self._initial_values = trainer.set_initial_training_values
        trainer.set_initial_training_values = self.set_initial_training_values
        self._init_state, self._run_epoch = trainer._init_training_state, trainer._run_epoch
        trainer._init_training_state, trainer._run_epoch = self.init_training_state, self.run_epoch
        trainer._load_callback_state = self.load_callback_state

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint, as of any callback with a state."""
        return {"args": {}, "attributes": {"epoch_ended": self._epoch_ended}}

    # Callbacks --------------------------------------------------------------------------------------------------

    def on_step_end(self, args: "TrainingArguments", state: TrainerState, control: "TrainerControl", **_: Any) -> None:
        self._epoch_ended = False

    def on_epoch_end(self, args: "TrainingArguments", state: TrainerState, control: "TrainerControl", **_: Any) -> None:
        self._epoch_ended = True

    # Replacements of the Trainer's methods ----------------------------------------------------------------------

    def load_callback_state(self) -> None:
        """Replace `Trainer._load_callback_state`, which makes new callbacks and changes their order."""
        state = self._trainer.state
        self._stored, self._history = state.stateful_callbacks, list(state.log_history)
        asked = self._stored.get("TrainerControl", {}).get("args", {})
        # A run that had reached its last step may have been given more steps since.
        self._stop_asked = asked.get("should_training_stop", False) and state.global_step < state.max_steps
        self._epoch_stop_asked = asked.get("should_epoch_stop", False)
        mine = self._stored.get("Decisions", {}).get("attributes", {})
        self._epoch_ended = mine.get("epoch_ended", float(state.epoch).is_integer())
        self._max_steps = state.max_steps
        self.refresh()

    def refresh(self) -> None:
        """Have the Trainer's state hold the present state of each callback, once each."""
        handler = self._trainer.callback_handler
        stateful = [one for one in (*handler.callbacks, self._trainer.control) if isinstance(one, ExportableState)]
        self._trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks

    def init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Replace `Trainer._init_training_state`: epochs done, and batches done of the epoch under way."""
        epochs, batches = self._init_state(*args, **kwargs)
        state, accumulation = self._trainer.state, self._trainer.args.gradient_accumulation_steps
        epoch = float(state.epoch)
        if self._max_steps <= state.global_step < state.max_steps:  # it has been given more steps since
            self._epoch_ended = epoch.is_integer()
        if not self._stored or epoch.is_integer():
            return (epochs, batches) if not self._stored else (int(epoch), 0)
        if self._epoch_ended or self._epoch_stop_asked:
            return int(epoch) + 1, 0  # it was ended early
        total = self._batches_of_epoch or self._max_steps * accumulation
        return int(epoch), accumulation * round((epoch - int(epoch)) * total / accumulation)

    def set_initial_training_values(self, args: "TrainingArguments", loader: Any) -> Any:
        """Replace the Trainer's method, to see how many batches an epoch has (0: not known)."""
        self._batches_of_epoch = len(loader) if has_length(loader) else 0
        return self._initial_values(args, loader)

    def run_epoch(self, **kwargs: Any) -> None:
        """Replace `Trainer._run_epoch`: nothing is left of an epoch that was ended, or of training."""
        if self._finished:
            self._trainer.control.should_training_stop = True
        elif kwargs["epoch"] <= self._last_ended:
            self._trainer._load_rng_state(kwargs["resume_from_checkpoint"])
        else:
            self._run_epoch(**kwargs)

    # After a resume ---------------------------------------------------------------------------------------------

    def complete(self, checkpoint: str, pending: bool) -> None:
        """Do what is still to be done at the step that was resumed from; other callbacks' `on_train_begin` is over.

        Args:
            pending: an evaluation was due and was not made.
        """
        trainer, control = self._trainer, self._trainer.control
        self._restore_callbacks()
        trainer.args.eval_on_start = False  # it was made before the first step
        control.should_training_stop |= self._stop_asked
        control.should_epoch_stop |= self._epoch_stop_asked
        if pending or (self._is_over() and not self._epoch_ended):
            self._make_up(checkpoint, pending)
        if self._epoch_ended:  # perhaps just now: the Trainer has computed already where it goes on
            self._last_ended = math.ceil(trainer.state.epoch) - 1
        # A Trainer that is resumed at its last step would take one more.
        self._finished = trainer.state.global_step >= trainer.state.max_steps or trainer.control.should_training_stop

    def _restore_callbacks(self) -> None:
        """Set callbacks to their saved state, in place; what they did as this attempt began does not count."""
        state, found = self._trainer.state, dict[str, int]()
        for callback in self._trainer.callback_handler.callbacks:
            name = type(callback).__name__
            saved = self._stored.get(name)
            number = found[name] = found.get(name, -1) + 1
            if isinstance(callback, ExportableState) and saved is not None and callback is not self:
                of_each = saved if isinstance(saved, list) else [saved]
                for attribute, value in (of_each[number]["attributes"] if number < len(of_each) else {}).items():
                    setattr(callback, attribute, value)
        state.log_history[:] = self._history

    def _make_up(self, checkpoint: str, pending: bool) -> None:
        trainer = self._trainer
        trainer._load_rng_state(checkpoint)
        self._evaluation.making_up = True
        if pending:
            self._run.say(f"step {trainer.state.global_step}: making up for the evaluation that was cut short")
            self._determine_best(trainer._evaluate(None, None), None)
        if self._is_over() and not self._epoch_ended:
            state = trainer.state
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, state, trainer.control)
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss, None, trainer.model_wrapped, None, state.epoch, None, time.time()
            )
        self._evaluation.making_up = False
        self.random_state = random_state.capture()

    def _is_over(self) -> bool:
        """Whether the epoch ends at this step."""
        state, control = self._trainer.state, self._trainer.control
        asked = bool(control.should_epoch_stop or control.should_training_stop)
        return asked or float(state.epoch).is_integer() or state.global_step >= state.max_steps
