"""What a training script holds: :class:`Run`, with which a Hugging Face Trainer or a loop of one's own is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attempt.attempt import RankAttempt
from .processes import exit_at_once

if TYPE_CHECKING:
    from transformers import Trainer


class Run(RankAttempt):
    """A run, as the attempt of it that this process takes part in."""

    def train(self, trainer: "Trainer") -> Any:
        """Train with a Hugging Face Trainer (any subclass), from where the run stands, to the end.

        Saves what `trainer.save_model` writes as `final/` and finishes the run. When the job is preempted this does
        not return: the process ends with exit code 75, and the next attempt goes on from the same step.

        Returns:
            The Trainer's `TrainOutput`.
        """
        from .huggingface.trainer import train

        try:
            output = train(self, trainer)
        except Exception as error:
            code = self.fail(error)
            if self._guard.requested is not None:
                exit_at_once(code)  # on its way out: nothing may hold it up
            raise
        self._guard.uninstall()
        return output

    def step_end(
        self, step: int, save: Callable[[Path], None], *, total: int | None = None, loss: float | None = None
    ) -> None:
        """For a hand-written loop: `step` optimizer steps are done. Saves if it is time to; leaves if asked to.

        Args:
            save: called on every rank with an existing directory; writes all that a resume needs into it.
            total: optimizer steps in all, for the progress bar.
            loss: the last loss, for the progress bar.
        """
        self.update_progress(step=step, total_steps=total, loss=loss)
        action = self.steps.done(step)
        if action != "go_on":
            self.checkpoint(step, save)
        if action == "stop":
            self.leave(step)
