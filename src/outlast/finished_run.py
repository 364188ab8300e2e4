"""What a script holds of a run that has finished before: :class:`FinishedRun` trains nothing, and lets it go on."""

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .attempt.joining import AlreadyFinished
from .attempt.kept import Kept
from .attempt.loading import guard_loads
from .attempt.resuming import Resuming
from .checkpoint.manifest import Sealed, read_manifest, verify
from .checkpoint.space import Space
from .checkpoint.store import CheckpointStore
from .config.checkpoint import CheckpointSection
from .config.preemption import PreemptionSection
from .config.storage import StorageSection
from .errors import CheckpointError, ConfigError, OutlastError, ResumeRefusedError
from .preemption.cause import StopCause
from .preemption.outcome import Outcome
from .preemption.signals import PreemptionGuard
from .ranks.collectives import Collectives
from .ranks.identity import Identity
from .run import Run
from .rundir.attempts import next_attempt
from .rundir.directory import RunDirectory
from .rundir.ledger import Ledger, Recorder
from .slurm.environment import current_job, in_own_batch_script
from .storage.share import Share

if TYPE_CHECKING:
    from transformers import Trainer

ELSEWHERE = 'give it a directory of its own: outlast.start("runs/another")'


class FinishedRun(Run):
    """A run that has finished before.

    A Trainer gets the finished model. A loop of one's own finds the checkpoint of its last step, and nothing left to
    train. Nothing of the run is written; a signal requeues the job, for what follows in the script.

    Args:
        guard: installed already.
        step: the step at which the run has finished.
        requeue: as of a run that trains.
    """

    def __init__(
        self,
        directory: RunDirectory,
        guard: PreemptionGuard,
        preemption: PreemptionSection,
        checkpoint: CheckpointSection,
        storage: StorageSection,
        *,
        step: int,
        requeue: bool = False,
    ) -> None:
        self.directory, self._guard, self._preemption, self._step = directory, guard, preemption, step
        self.collectives = Collectives()
        self._ledger = Ledger(directory.ledger)
        around = current_job()
        job = around if requeue or in_own_batch_script() else None
        number = next_attempt(self._ledger.read()) - 1
        self._identity = Identity(self.rank, self.world_size, job, number, around)
        self._recorder = Recorder(self._ledger, self._identity, self.say)
        self._cause = StopCause(directory, self._identity, guard, preemption, self.say)
        self._outcome = Outcome(directory, self._identity, preemption, self._recorder, self.say)
        space = Space(directory, Share(directory, storage))
        self.store = CheckpointStore(directory, self.collectives, self.record, space, say=self.say)
        self._resuming = Resuming(directory, self.collectives, self.store, checkpoint.allow, self.say)
        self.kept = Kept(self.rank, self.say)
        self._newest: Sealed | None = None
        self._loops = 0
        guard_loads(directory)
        self._leave_when_signalled()

    @property
    def finished(self) -> int | None:
        """The step at which the run has finished."""
        return self._step

    @property
    def stopping(self) -> bool:
        """False: a finished run never stops."""
        return False

    def record(self, event: str, **values: Any) -> None:
        """Write nothing: the record of a finished run is complete."""

    def update_progress(self, *, force: bool = False, **values: Any) -> None:
        """Write nothing."""

    def check_budget(self, part: str, size: int) -> None:
        """Ask for nothing: nothing is saved any more."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Write nothing."""

    def train(self, trainer: "Trainer") -> Any:
        """Load `final/` into the Trainer's model, without training.

        Returns:
            A `TrainOutput` as training returned it.

        Raises:
            ResumeRefusedError: it was another run that has finished here.
            CheckpointError: `final/` is not what was saved, or can't be loaded.
            OutlastError: this run has been in this script already.
        """
        from .huggingface.described import describe
        from .huggingface.finished import load

        if self._done:
            raise OutlastError(f"{self.directory.path} has been trained by this script already; {ELSEWHERE}")
        describe(self, trainer)
        last = self._find()
        self.collectives.on_rank_0(self._verify_model, CheckpointError)
        trained = [event["metrics"] for event in self._ledger.read() if event["event"] == "trained"]
        output = load(trainer, self.final, last, self._step, trained[-1] if trained else {})
        if last is not None:
            self.kept.read(last)
            self.kept.restore(of_others=False)
        self.say(f"loaded {self.final}; the script goes on")
        self._end_of_run(self._step)
        return output

    def resume_point(self) -> Sealed | None:
        """The checkpoint of the last step, so that a loop has what it had at its end. All ranks call it together.

        Raises:
            ResumeRefusedError: it was another run that has finished here.
            AlreadyFinished: (a `SystemExit` with code 0) that checkpoint is no longer there.
        """
        self._newest = self._find()
        if self._newest is None:
            self.say(
                f"checkpoint-{self._step} is not there, so that this loop has nothing to go on with: leaving. A script "
                "that goes on after training asks for `run.finished` first, and loads `run.final`"
            )
            self._guard.uninstall()
            raise AlreadyFinished(self._step)
        self.kept.read(self._newest)
        return self._newest

    def begin(self, step: int) -> None:
        """Set what was kept, and the random state; nothing is trained."""
        from .huggingface.own_loop import KEPT, OwnLoop

        self._loop = OwnLoop(self, self._newest)
        self._loop.close()
        self.keep(KEPT, self._loop)
        self.kept.restore()
        self._guard.end_startup()

    def epochs(self, loader: Any, count: int | None = None) -> Iterator[tuple[int, Any]]:
        """Yield nothing: no epoch is left.

        Raises:
            ConfigError: the loop is longer than the one that has finished.
        """
        loop, self._loops = self._own_loop("epochs"), self._loops + 1
        if count is not None and (was := loop.counted(self._loops - 1)) is not None and count > was:
            self._refuse("run.epochs", f"{count} epochs", f"{was} epochs")
        return iter(())

    def batches(self, loader: Any) -> Iterator[Any]:
        """Return an iterator that refuses the first batch: nothing is left to train.

        Raises:
            ConfigError: when the loop takes one: it goes on training.
        """
        self._own_loop("batches")
        return (self._refuse("run.batches", f"step {self._step + 1}", f"{self._step} steps") for _ in repeat(None))

    def step_end(
        self, step: int, save: Callable[[Path], None], *, total: int | None = None, loss: float | None = None
    ) -> None:
        """Refuse a step beyond the last.

        Raises:
            ConfigError: the loop goes on training.
        """
        if step > self._step:
            self._refuse("run.step_end", f"step {step}", f"{self._step} steps")

    def checkpoint(self, step: int, save: Callable[[Path], None], **_: Any) -> Sealed | None:
        """Write nothing, and return the checkpoint of the last step."""
        return self._newest

    def finish(self, step: int, save: Callable[[Path], None] | None = None, *, weights_step: int | None = None) -> None:
        """Leave `final/` as it is.

        Raises:
            ConfigError: the loop ends at another step than it did.
        """
        if step != self._step:
            self._refuse("run.finish", f"step {step}", f"{self._step} steps")
        self.say(f"finished before, at step {step}; the model is in {self.final}")
        self._end_of_run(step)

    def _refuse(self, key: str, value: str, was: str) -> NoReturn:
        self._guard.uninstall()
        valid = (
            f"valid: {was}, with which {self.directory.path} has finished (`run.finished`). To train on, {ELSEWHERE}"
        )
        raise ConfigError(key, value, valid)

    def _find(self) -> Sealed | None:
        """The checkpoint of the last step if it is whole, after a look at who has made the model."""
        self.collectives.on_rank_0(self._check, ResumeRefusedError)
        for checkpoint in self.store.sealed() if self.directory.checkpoints.is_dir() else ():
            if checkpoint.step == self._step and not checkpoint.manifest.light:
                try:
                    verify(checkpoint.path)
                except CheckpointError as error:
                    self.say(f"WARNING: {checkpoint.path.name}: {error}")
                else:
                    return checkpoint
        return None

    def _verify_model(self) -> None:
        try:
            verify(self.final)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.final} is not what was saved: {error}. Put back a copy of it; to train again, {ELSEWHERE}"
            ) from None

    def _check(self) -> None:
        """Refuse to pass the finished model for that of another run."""
        try:
            manifest = read_manifest(self.final)
        except CheckpointError:  # a loop may publish no model
            return
        compared, now = self._resuming.compared(manifest), self._resuming.origin
        problems = [text for name, text in compared.refused.items() if name != "world_size"]
        trained, wanted = manifest.origin.get("settings", {}), now.get("settings", {})
        problems += [compared.noted[name] for name in sorted(trained.keys() & wanted.keys() & compared.noted.keys())]
        length = manifest.origin.get("length")
        if length is not None and now.get("length", length) != length:
            problems.append(f"it is to train {now['length']}, it has trained {length}")
        if problems:
            raise ResumeRefusedError(
                f"{self.directory.path} has finished, at step {self._step}, as another run than this: "
                f"{'; '.join(problems)}. To train on, {ELSEWHERE}"
            )
