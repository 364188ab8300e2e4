"""What a training script holds: :class:`Run`, with which a Hugging Face Trainer or a loop of one's own is trained."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attempt.attempt import RankAttempt
from .attempt.loading import refusing_unreadable
from .errors import OutlastError
from .processes import exit_at_once

if TYPE_CHECKING:
    from transformers import Trainer

    from .huggingface.own_loop import OwnLoop


class Run(RankAttempt):
    """A run, as the attempt of it that this process takes part in."""

    _loop: "OwnLoop | None" = None
    _by_trainer = False

    def train(self, trainer: "Trainer") -> Any:
        """Train with a Hugging Face Trainer (any subclass), from where the run stands, to the end.

        Saves what `trainer.save_model` writes as `final/` and finishes the run. When the job is preempted this does
        not return: the process ends with exit code 75, and the next attempt goes on from the same step.

        Returns:
            The Trainer's `TrainOutput`.

        Raises:
            ConfigError: a setting of the Trainer is refused: with it a resume would not be exact.
            ResumeRefusedError: the checkpoint is another run's, or what was loaded is not what was saved.
            CheckpointError: the finished model could not be written, or a kept object can't take its state.
        """
        from .huggingface.trainer import train

        self._by_trainer = True
        try:
            output = train(self, trainer)
        except Exception as error:
            code = self.fail(error)
            if self._guard.requested is not None:
                if isinstance(error, OutlastError):
                    print(f"outlast: {error}", file=sys.stderr)
                exit_at_once(code)  # on its way out: nothing may hold it up
            raise
        self._guard.uninstall()
        return output

    def begin(self, step: int) -> None:
        """For a hand-written loop: everything is loaded, `step` optimizer steps are done. All ranks call it together.

        On a resume it sets the random state in which that step ended, of Python, NumPy and torch, GPUs included.

        Raises:
            CheckpointError: an object that :meth:`keep` was given can't take its state.
        """
        if not self._by_trainer:
            from .huggingface.own_loop import KEPT, OwnLoop

            self.loop_saves = False
            self._loop = OwnLoop(self, self._newest)
            self.keep(KEPT, self._loop)
        super().begin(step)

    def epochs(self, loader: Any, count: int | None = None) -> Iterator[tuple[int, Any]]:
        """For a hand-written loop: the epochs that are left, each with the batches of it that are left.

        What the loader draws at random (order, augmentations, masks) depends on the seed that torch had when the run
        began, the epoch and the batch's number: it is the same after a resume, in workers too.

        Args:
            loader: a `DataLoader`, best as accelerate's `prepare` returns it. From here on the run reads it; all ranks
                call this together, and for several loaders in the same order in each attempt.
            count: epochs in all; None: without end.

        Returns:
            Pairs of the epoch's number, from 0, and an iterable of its batches; `len` of that is how many are left.

        Raises:
            ConfigError: the loader's batches can't be found again after a resume; the message says what can.
            ResumeRefusedError: this number of ranks can't go on with it.
        """
        return self._own_loop("epochs").epochs(loader, count)

    def batches(self, loader: Any) -> Iterator[Any]:
        """For a hand-written loop that counts steps: batches without end, epoch after epoch, from where the run stands.

        See :meth:`epochs`.

        Raises:
            ConfigError: the loader's batches can't be found again after a resume.
            ResumeRefusedError: this number of ranks can't go on with it.
        """
        return (batch for _, epoch in self.epochs(loader) for batch in epoch)

    def _own_loop(self, name: str) -> "OwnLoop":
        if self._loop is None:
            raise RuntimeError(
                f"run.{name}: call run.resume_point(), load what it names, and call run.begin(step) first"
            )
        return self._loop

    def step_end(
        self, step: int, save: Callable[[Path], None], *, total: int | None = None, loss: float | None = None
    ) -> None:
        """For a hand-written loop: `step` optimizer steps are done. Saves if it is time to; leaves if asked to.

        Args:
            save: called on every rank with an existing directory; writes all that a resume needs into it.
            total: optimizer steps in all, for the progress bar; the last of them is saved in any case.
            loss: the last loss, for the progress bar.
        """
        self.update_progress(step=step, total_steps=total, loss=loss)
        self._own_loop("step_end").step_done()
        action = self.steps.done(step)
        if action != "go_on" or (total is not None and step >= total):
            self.checkpoint(step, refusing_unreadable()(save))
        if action == "stop":
            self.leave(step)
