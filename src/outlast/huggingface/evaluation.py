"""Runs the evaluations of training: a stop can cut one short, and the next attempt makes up for it.

An evaluation that is cut leaves no trace: random numbers, metrics, logs and callbacks are put back to what they were
before it. What a callback evaluates by itself (`trainer.evaluate()`) is never cut: the callback could not go on from
there in the next attempt.
"""

from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from . import random_state
from .own_state import OwnState

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from outlast.attempt.attempt import RankAttempt


class _Cut(BaseException):
    """Raised out of an evaluation when the ranks have agreed to leave; no `except Exception` on the way stops it."""


class Evaluation(TrainerCallback):  # type: ignore[misc]
    """Replaces `Trainer.evaluate`, and polls between the batches of an evaluation.

    Args:
        save: saves the step, whose evaluation is pending, and leaves.
    """

    def __init__(self, run: "RankAttempt", trainer: "Trainer", save: Callable[[], None]) -> None:
        self._run, self._trainer, self._save = run, trainer, save
        self.pending = False
        """Whether an evaluation was due at this step and has not been made."""
        self.making_up = False
        """Whether it is that of a step that is sealed already."""
        self._depth = 0  # evaluate() calls itself for each of several datasets
        self._of_loop = self._may_cut = False
        self._batches = 0  # done, of the evaluation under way
        self._by_loop, self._evaluate = trainer._evaluate, trainer.evaluate
        trainer._evaluate, trainer.evaluate = self.by_loop, self.evaluate

    def by_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Replace `Trainer._evaluate`, which is how the training loop itself evaluates."""
        self._of_loop = True
        try:
            return self._by_loop(*args, **kwargs)
        finally:
            self._of_loop = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Replace `Trainer.evaluate`: during training, a complete evaluation is recorded."""
        trainer, run = self._trainer, self._run
        if not trainer.is_in_train or self._depth:
            return dict(self._evaluate(*args, **kwargs))
        self._may_cut, self._of_loop = self._of_loop, False
        undo = self._remember() if self._may_cut else None
        self._depth, self._batches = 1, 0
        run.update_progress(phase="evaluating", force=True)
        try:
            metrics = dict(self._evaluate(*args, **kwargs))
        except _Cut:
            assert undo is not None
            undo()
            step = trainer.state.global_step
            if step == 0 or self.making_up:  # nothing is trained yet; or the step's checkpoint says what is due
                run.leave(step)
            self.pending = True
            self._save()  # does not return: the run is stopping
            raise
        finally:
            self._depth = 0
        run.update_progress(phase="training", force=True)
        trainer.control.should_save |= self._may_cut and run.stopping  # there was time to finish it first
        run.evaluated(trainer.state.global_step, {k: v for k, v in metrics.items() if "_per_" not in k})
        return metrics

    def on_prediction_step(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if not self._depth or not self._may_cut:
            return
        self._batches += 1
        if self._run.steps.should_stop(state.global_step, "evaluation") and not self._may_finish(eval_dataloader):
            raise _Cut

    def _may_finish(self, loader: Any) -> bool:
        """Whether an evaluation fits in before the save; one being made up for need not, its step is sealed already."""
        known = isinstance(loader, Sized) and not isinstance(self._trainer.eval_dataset, dict)
        left = len(loader) - self._batches if known and not self.making_up else None
        return self._run.steps.time_for("evaluation", left) is True

    def _remember(self) -> Callable[[], None]:
        """Return what puts everything back that an evaluation changes."""
        trainer, numbers = self._trainer, random_state.capture()
        history, control = len(trainer.state.log_history), dict(vars(trainer.control))
        states = [OwnState(one) for one in (trainer, *trainer.callback_handler.callbacks) if one is not self]
        values, kept = [state.values() for state in states], self._run.kept.snapshot()

        def undo() -> None:
            random_state.restore(numbers)
            self._run.kept.go_back(kept)
            del trainer.state.log_history[history:]
            vars(trainer.control).update(control)
            for state, value in zip(states, values, strict=True):
                state.restore(value)

        return undo
