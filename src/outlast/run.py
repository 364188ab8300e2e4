"""One attempt at a run, from start to leave: what every training loop, Hugging Face's or one's own, calls.

The way of a signal: `preemption.py` sets the flag; :meth:`Run.step_done` lets all ranks agree at a step's end;
:meth:`Run.checkpoint` has them save that step (`saving.py`, `checkpoint/store.py`); :meth:`Run.leave` requeues the job
(`departure.py`, `requeue.py`, `slurm/`) and ends the process.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .attempt.saving import Saver
from .attempt.steps import StepEnd, Verdict
from .checkpoint.manifest import Sealed, versions
from .config.sections import CheckpointSection, PreemptionSection, StorageSection
from .errors import CheckpointError, Exit, OutlastError, SlurmError
from .preemption.deadline import Planner, Work
from .preemption.previous_attempt import settle_predecessor
from .preemption.shutdown import Departure
from .preemption.signals import PreemptionGuard
from .preemption.startup import StartupLeave
from .processes import exit_at_once
from .ranks.collectives import Agreement
from .ranks.lost import LostRankError
from .rundir.attempts import ATTEMPT_ENV, attempt_of, attempts, finished
from .rundir.directory import LOCK_FD_ENV, RunDirectory, RunLock
from .rundir.ledger import Ledger, Recorder
from .rundir.progress import ProgressWriter
from .slurm.environment import current_job, export_ranks, hostnames
from .slurm.view import end_time_of, notice_of, show_job

if TYPE_CHECKING:
    from transformers import Trainer

    from .ranks.layout import Layout


class AlreadyFinished(SystemExit):
    """Raised by :class:`Run` on a run that has finished: the process ends well, having done nothing."""

    def __init__(self, step: int) -> None:
        super().__init__(int(Exit.DONE))
        self.step = step


class Run:
    """The attempt that this process, as one rank, takes part in.

    Args:
        loop_saves: when to save periodically is up to the training loop, whatever `checkpoint` says.
    """

    def __init__(
        self,
        directory: RunDirectory,
        guard: PreemptionGuard,
        preemption: PreemptionSection,
        checkpoint: CheckpointSection,
        storage: StorageSection,
        *,
        loop_saves: bool = False,
    ) -> None:
        self.directory, self.loop_saves = directory, loop_saves
        self._preemption = preemption
        self._started = time.time()
        self._guard = guard
        self._job = current_job()
        export_ranks()
        self.agreement = Agreement()
        self._ledger = Ledger(directory.ledger)
        events = self._ledger.read()
        if done := finished(events):
            self.say(f"{directory.path} has finished already, at step {done['step']}; nothing to do")
            raise AlreadyFinished(done["step"])
        directory.create()
        self._lock = RunLock(directory)
        if self.rank == 0 and LOCK_FD_ENV not in os.environ:
            # A predecessor of the same job may still be on its way out, on another node.
            self._lock.acquire(f"job {self._job.job_id}" if self._job else "a training script", wait_s=60.0)
        job = (self._job.job_id, self._job.restart_count) if self._job else None
        self.attempt = int(os.environ.get(ATTEMPT_ENV, 0)) or attempt_of(self._ledger.read(), job)
        self._recorder = Recorder(self._ledger, self.attempt, _print)
        self._saver = Saver(
            directory, self.agreement, self.record, self.say, section=checkpoint, storage=storage, loop_saves=loop_saves
        )
        self.store = self._saver.store
        self.progress = ProgressWriter(directory)
        self.progress.now.attempt = self.attempt
        self._departure = Departure(
            self._recorder, _print, self._ledger, self._job, preemption, self.attempt, self.rank == 0
        )
        self._leave_in_startup = StartupLeave(self._departure, guard, self.store, self._ledger, self.agreement)
        self._planner = Planner(preemption.lead_s, self._saver.expected_bytes)
        self._step_end = StepEnd(
            self.agreement,
            guard,
            self._departure,
            self._saver,
            self._planner,
            self._ledger,
            hang_s=preemption.hang_s,
            lead_s=preemption.lead_s,
        )
        guard.on_startup, guard.lead_s = self._leave_in_startup, preemption.lead_s
        guard.on_signal = self._step_end.on_signal
        if self.rank == 0:
            self._open_attempt()
        if guard.requested is not None and not self.stopping:
            self._leave_in_startup(guard.requested)  # it came before there was a run to leave

    @property
    def rank(self) -> int:
        return self.agreement.rank

    @property
    def final(self) -> Path:
        """Where the finished model goes."""
        return self.directory.final

    @property
    def stopping(self) -> bool:
        """Whether all ranks have agreed to save and leave."""
        return self._departure.signal is not None

    def say(self, text: str) -> None:
        """Print a line in the log (rank 0 only)."""
        if self.agreement.rank == 0:
            _print(text)

    def record(self, event: str, **values: Any) -> None:
        """Append a line to the ledger (rank 0 only). On a full disk it is kept, and written with the next."""
        if self.rank == 0:
            self._recorder(event, **values)

    def describe(self, **origin: Any) -> None:
        """Say what this run is, as far as a checkpoint depends on it; to be called before :meth:`resume_point`.

        Args:
            origin: any of `dataset`, `seed`, `global_batch`, `micro_batch`, `trainable`, `config`, as plain values;
                `checkpoint/origin.py` has what follows if one differs on resume. With `accumulation` in the place of
                `global_batch`, the loop takes it from `run.layout` afterwards: that suits another number of ranks.
        """
        self._saver.describe(**origin)

    @property
    def layout(self) -> "Layout":
        """How the rows of each optimizer step are spread; only if :meth:`describe` was told the `accumulation`."""
        return self._saver.agreed_layout

    def _open_attempt(self) -> None:
        decision = settle_predecessor(self.directory, self.attempt, self._job, self._preemption)
        if decision is not None and decision.action in ("give_up", "fail"):  # Slurm's own restart; ours would not be
            self.record("gave_up", reason=decision.reason)
            self.say(f"giving up: {decision.reason}")
            raise SystemExit(int(Exit.GAVE_UP))
        self.store.sweep()
        job = self._job
        hosts = hostnames(job.nodelist) if job and job.nodelist else [socket.gethostname()]
        self.record(
            "attempt_started",
            job_id=job.job_id if job else None,
            restart_count=job.restart_count if job else 0,
            hosts=hosts,
            world_size=self.agreement.world_size,
            versions=versions(),
        )
        self.say(f"attempt {self.attempt} on {', '.join(hosts)}, {self.agreement.world_size} rank(s)")
        self._update_progress(phase="starting")
        if job is None:
            return
        try:
            view = show_job(job.job_id, timeout_s=5.0)
        except SlurmError as error:
            self.say(f"Slurm did not say when this job ends ({error}); its signal is what is left")
            return
        self._guard.end_time, self._guard.ask_end_time = view.end_time, lambda: end_time_of(job.job_id)
        with suppress(SlurmError):
            self._departure.notice = notice_of(job.job_id, self._preemption.grace_s)
        self._watch_the_clock()
        if view.preempt_time is not None and view.preempt_time >= (view.start_time or 0.0):
            self._leave_in_startup("TERM")  # its signal came before this process could catch one

    def resume_point(self) -> Sealed | None:
        """The newest checkpoint that verifies, or None on a fresh run. All ranks call it together.

        Raises:
            ResumeRefusedError: it was made by another run than this one; the message says what to do.
        """
        self.attempt = self._departure.attempt = self.agreement.from_rank_0(self.attempt)
        self._recorder.attempt = self.attempt
        self._step_end.connect()
        return self._saver.resume_point()

    def begin(self, step: int) -> None:
        """Everything is loaded and `step` optimizer steps are done: training begins. All ranks call it together."""
        self._step_end.connect()
        seconds = time.time() - self._started
        if self._saver.newest_step is not None:
            name, differences = self.store.path(self._saver.newest_step).name, self._saver.differences
            self.record("resumed", step=step, checkpoint=name, seconds=seconds, differences=differences)
            self.say(f"resumed from {name} after {seconds:.1f} s")
        events = self._ledger.read()
        self._saver.begin(events)
        self._planner.begin(events)
        self._watch_the_clock()
        self._guard.end_startup()
        self._update_progress(phase="training", step=step, force=True)
        if self.should_stop(step):
            self.leave(step)

    def _watch_the_clock(self) -> None:
        """Leave in time, by what steps and saves were seen to take; say so if the notice is too short (rank 0)."""
        if self._job is None or self.rank != 0:
            return
        if self._guard.end_time is not None:
            longest = max(self._guard.end_time - self._started, 0.0) / 2
            self._guard.lead_s = min(self._planner.lead_s, longest)
        if short := self._planner.shortfall(self._departure.notice):
            text, fields = short
            self.record("notice_short", **fields)
            self.say(f"WARNING: {text}")

    def should_stop(self, step: int, work: Work = "step") -> bool:
        """Whether any rank was asked to stop; to be asked at the same point on all ranks.

        Args:
            work: what has been done since the last such point: a micro-batch of a step, or an evaluation's batch.
        """
        return self._step_end.should_stop(step, work)

    def time_for(self, work: Work, count: int | None) -> bool | None:
        """Asked to stop: whether `count` more micro-batches or batches can be finished before the save.

        All ranks call it together. None: not known, for want of a deadline or of something to measure by.
        """
        return self._step_end.time_for(work, count)

    def step_done(self, step: int) -> Verdict:
        """What all ranks do now that `step` optimizer steps are done."""
        return self._step_end.step_done(step)

    def step_end(
        self, step: int, save: Callable[[Path], None], *, total: int | None = None, loss: float | None = None
    ) -> None:
        """For a hand-written loop: `step` optimizer steps are done. Saves if it is time to; leaves if asked to.

        Args:
            save: called on every rank with an existing directory; writes all that a resume needs into it.
            total: optimizer steps in all, for the progress bar.
            loss: the last loss, for the progress bar.
        """
        self._update_progress(step=step, total_steps=total, loss=loss)
        verdict = self.step_done(step)
        if verdict != "go_on":
            self.checkpoint(step, save)
        if verdict == "stop":
            self.leave(step)

    def checkpoint(
        self,
        step: int,
        save: Callable[[Path], None],
        *,
        pending_evaluation: bool = False,
        best_step: int | None = None,
    ) -> Sealed | None:
        """Save `step` on all ranks: an emergency checkpoint if the run is stopping, else a periodic one.

        Returns:
            The sealed checkpoint, or None if it could not be written (the ledger says why; what was there before
            stands). A step that has a sealed checkpoint already is not written again.
        """
        if self._saver.newest_step == step:
            if pending_evaluation and self.rank == 0:
                self.store.mark_pending(step)
            self.agreement.barrier()
            return self._saver.newest()
        self._update_progress(phase="saving", step=step, force=True)
        began = time.monotonic()
        sealed = self._saver.save(
            step,
            save,
            kind="emergency" if self.stopping else "periodic",
            asked_at=self._departure.asked_at if self.stopping else None,
            pending_evaluation=pending_evaluation,
            best_step=best_step,
        )
        if sealed is not None:
            self.progress.now.checkpoint_step, self.progress.now.checkpoint_time = step, time.time()
            self._planner.saved(time.monotonic() - began)
            self._watch_the_clock()
        self._update_progress(phase="training", force=True)
        return sealed

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Note an evaluation that ran to its end."""
        self.record("evaluated", step=step, metrics=metrics)
        self._planner.mark()

    def leave(self, step: int) -> NoReturn:
        """Requeue the job, once, and end this process; all ranks call it together, everything being saved."""
        self._step_end.watch.all_saved()
        code = int(self._departure.requeue(step)) if self.rank == 0 else int(Exit.RESUME_ME)
        if self.rank == 0:
            self._step_end.watch.leaving(Exit(code))
        try:
            code = self.agreement.from_rank_0(code)
            self.agreement.close()
        finally:  # the requeue may have ended a peer already: what is saved is saved, and this rank leaves
            exit_at_once(code)

    def finish(self, step: int, save: Callable[[Path], None] | None = None) -> None:
        """The run is done after `step` steps: publish the model and say so. All ranks call it together.

        Args:
            save: called on every rank with an existing directory; writes the finished model into it.

        Raises:
            CheckpointError: the model could not be written; the run is not finished.
        """
        if save is not None and self._saver.save(step, save, kind="final") is None:
            raise CheckpointError(f"the finished model could not be written to {self.final}; the same command resumes")
        self.agreement.barrier()
        self._step_end.watch.close()
        if self.rank == 0:
            first = attempts(self._ledger.read())[0].started
            seconds = time.time() - (first["time"] if first else self._started)
            self.record("attempt_ended", cause="finished", step=step)
            self._update_progress(phase="done", step=step, force=True)
            self.record("finished", step=step, seconds=seconds)  # the very last: who finds it has nothing to clear up
            if self._recorder.waiting:
                raise OutlastError(f"{self._ledger.path} can't be written, so the run does not count as finished")
        self.say(f"finished at step {step}; the model is in {self.final}")
        self._lock.release()

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

    def fail(self, error: BaseException) -> int:
        """Note that this attempt ended by an exception.

        Returns:
            The exit code. An error raised while the job is being taken away (a worker killed, a peer gone) counts as
            the preemption that caused it: the last sealed checkpoint stands, and the job is requeued.
        """
        lost = self._step_end.watch.blame(error)
        if lost is not None:
            error, self._departure.lost = LostRankError([lost]), [lost]
        return self._departure.fail(error, self._guard, self.rank, self._step_end.step)

    def _update_progress(self, *, force: bool = False, **values: Any) -> None:
        if self.rank == 0:
            if force and values.get("phase") != "saving":  # what it adds is counted when it is there
                room = self.store.room
                values |= {"bytes_used": room.used(), "bytes_peak": room.peak, "budget_bytes": room.budget()}
            self.progress.update(force=force, **values)


def _print(text: str) -> None:
    print(f"[outlast] {text}", flush=True)
