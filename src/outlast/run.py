"""What a training script holds: :class:`Run`, with which a Hugging Face Trainer or a loop of one's own is trained."""

import atexit
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attempt.attempt import RankAttempt
from .attempt.loading import refusing_unreadable
from .checkpoint.manifest import Sealed
from .errors import BudgetError, CheckpointError, DivergedError, OutlastError
from .preemption.afterwards import Afterwards
from .processes import exit_at_once
from .ranks.started import refuse_late_ranks

if TYPE_CHECKING:
    from transformers import Trainer

    from .huggingface.own_loop import OwnLoop


class Run(RankAttempt):
    """A run, as the attempt of it that this process takes part in."""

    in_script = False
    """Whether a user's script holds it, which may go on after training: set by :func:`outlast.start`."""
    _loop: "OwnLoop | None" = None
    _by_trainer = _done = False
    _last_save: tuple[int, Callable[[Path], None]] | None = None

    @property
    def finished(self) -> int | None:
        """The step at which the run has finished; None while it trains. A loop that can end early asks this first."""
        return None

    def train(self, trainer: "Trainer") -> Any:
        """Train with a Hugging Face Trainer (any subclass), from where the run stands, to the end.

        Saves what `trainer.save_model` writes as `final/` and finishes the run. When the job is preempted this does
        not return: the process ends with exit code 75, and the next attempt goes on from the same step.

        If the run has finished before, it loads `final/` into the Trainer's model and returns at once, so that what
        follows in the script is done also where it was interrupted. The random numbers of Python, NumPy and torch go on
        alike in both cases. Afterwards the Trainer is as it was: its methods, callbacks and `output_dir`.

        Returns:
            The Trainer's `TrainOutput`.

        Raises:
            ConfigError: a setting of the Trainer is refused: with it a resume would not be exact.
            ResumeRefusedError: the checkpoint is another run's, or what was loaded is not what was saved.
            CheckpointError: the finished model could not be written or read, or a kept object can't take its state.
            OutlastError: this run has been trained in this script already; another phase has a run of its own.
        """
        from .huggingface.trainer import train

        if self._done:
            raise OutlastError(
                f"{self.directory.path} has been trained by this script already: a second phase is a run of its own, "
                'with a directory of its own: run = outlast.start("runs/phase2")'
            )
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
        self._end_of_run(output.global_step)
        return output

    def resume_point(self) -> Sealed | None:
        """The newest checkpoint that verifies, or None on a fresh run. All ranks call it together.

        Raises:
            ConfigError: there are more ranks than there were when the run started.
            ResumeRefusedError: it was made by another run than this one; the message says what to do.
            CheckpointError: something was saved, and nothing of it verifies.
            OSError: the file system hesitates; another attempt may fare better.
        """
        refuse_late_ranks(self.world_size)
        return super().resume_point()

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

    def check_budget(self, part: str, size: int) -> None:
        """See that the byte budget still holds the run with `size` more bytes of `part`; all ranks call it together.

        Args:
            part: what they are, in words (`prepared data`); rank 0's numbers count.

        Raises:
            BudgetError: it does not; the message has the arithmetic.
        """
        self._saver.check_budget({part: size})

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
            total: optimizer steps in all, for the progress bar.
            loss: the loss of this step, for the progress bar, and to see whether training is lost.

        Raises:
            DivergedError: it is, and the run is to stop then. All ranks raise it together, and nothing is saved.
        """
        self._last_save = (step, save)
        self.update_progress(step=step, total_steps=total, loss=loss)
        loop = self._own_loop("step_end")
        loop.look_at_loss(step, loss)
        loop.step_done()
        try:
            action = self.steps.done(step)
        except DivergedError as error:
            self.fail(error)
            raise
        if action != "go_on":
            self._last_save = None
            self.checkpoint(step, refusing_unreadable()(save))
        if action == "stop":
            self.leave(step)

    def finish(self, step: int, save: Callable[[Path], None] | None = None, *, weights_step: int | None = None) -> None:
        """The run is done after `step` steps: publish the model and say so. All ranks call it together.

        Args:
            save: called on every rank with an existing directory; writes the finished model into it.
            weights_step: the step that its weights are from, if that is the best by the metric; None: the last.

        Raises:
            OutlastError: the model (`CheckpointError`) or the ledger can't be written; the run is not finished.
        """
        if self._loop is not None:
            self._save_last(step)
        super().finish(step, save, weights_step=weights_step)
        if self._loop is not None:
            self._loop.close()
            if self.in_script:
                self._end_of_run(step)

    def _save_last(self, step: int) -> None:
        """Save the last step of a loop: a run that is made longer, or started again, goes on after it."""
        if self._last_save is not None and self._last_save[0] == step:
            try:
                self.checkpoint(step, refusing_unreadable()(self._last_save[1]))
            except (
                BudgetError,
                CheckpointError,
            ) as error:  # what is lost is only that: the model can still be published
                self.say(f"WARNING: {error}")

    def _end_of_run(self, step: int) -> None:
        """Leave the process to the script that goes on: its signals, and random numbers that a restart repeats."""
        self._done = True
        if not self.in_script:
            self._guard.uninstall()
        else:
            from .huggingface.generators import seed_for_what_follows

            self._leave_when_signalled()
            atexit.register(self.collectives.close)  # a group that is there at the end may abort the process
            seed_for_what_follows(int(self._resuming.origin.get("seed", 0)), step, self.rank)

    def _leave_when_signalled(self) -> None:
        """Have a signal end the process from here on, one that has come already too: there is nothing to save."""
        self._guard.uninstall()
        afterwards = Afterwards(self._identity, self._cause, self._outcome, self._preemption)
        afterwards.install()
        if (asked := self._guard.requested) is not None and asked not in ("INT", "HUP"):
            afterwards.leave(asked)
