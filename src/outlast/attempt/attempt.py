"""One attempt of one rank, from start to leave. All its parts are made here, in order, each complete."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from outlast import clock, notification
from outlast.checkpoint.manifest import Kind, Sealed
from outlast.checkpoint.space import Space
from outlast.checkpoint.store import CheckpointStore
from outlast.config.checkpoint import CheckpointSection
from outlast.config.guard import GuardSection
from outlast.config.preemption import PreemptionSection
from outlast.config.storage import StorageSection
from outlast.errors import CheckpointError, Exit, OutlastError
from outlast.preemption.cause import StopCause
from outlast.preemption.deadline import Planner
from outlast.preemption.outcome import Outcome
from outlast.preemption.previous_attempt import end_previous_attempt
from outlast.preemption.repeats import will_repeat
from outlast.preemption.shutdown import Shutdown
from outlast.preemption.signals import PreemptionGuard
from outlast.preemption.startup import LeaveInStartup
from outlast.preemption.watchdog import Watchdog
from outlast.processes import exit_at_once
from outlast.ranks.agreement import StepAgreement
from outlast.ranks.channel import ControlChannel
from outlast.ranks.collectives import Collectives
from outlast.ranks.gradient_buckets import keep_one_layout
from outlast.ranks.layout import Layout
from outlast.ranks.lost import LostRankError
from outlast.ranks.meeting import meet_in
from outlast.rundir.attempts import attempts
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger, Recorder
from outlast.rundir.progress import ProgressWriter, read
from outlast.storage.budget import Footprint
from outlast.storage.share import Share

from .bytes_watch import BytesWatch
from .joining import join, write_start
from .kept import Kept
from .limit import CheckpointLimit, planned_footprint
from .resuming import Resuming
from .saving import Saver
from .steps import Steps


class RankAttempt:
    """The attempt that this process takes part in, as one rank.

    Args:
        guard: installed already; from here on its signals are acted on.
        guarding: what follows a loss that says that training is lost.
        loop_saves: when to save periodically is up to a Trainer, if one trains, whatever `checkpoint` says.
        requeue: the Slurm job around this process is the run's, though its batch script is not ours.

    Raises:
        AlreadyFinished: the run has finished before.
        RunBusyError: another attempt is alive on the directory.
    """

    def __init__(
        self,
        directory: RunDirectory,
        guard: PreemptionGuard,
        preemption: PreemptionSection,
        checkpoint: CheckpointSection,
        storage: StorageSection,
        *,
        guarding: GuardSection | None = None,
        loop_saves: bool = False,
        requeue: bool = False,
    ) -> None:
        self.directory, self.loop_saves = directory, loop_saves
        self._started, self._guard, self._preemption = clock.now(), guard, preemption
        self.guarding = guarding or GuardSection()
        # Who this process is.
        meet_in(directory.path)
        self.collectives = collectives = Collectives()
        self._ledger = Ledger(directory.ledger)
        self._identity, self._lock = join(directory, collectives, self.say, requeue=requeue)
        identity = self._identity
        self._recorder = Recorder(self._ledger, identity, _print)
        self.progress = ProgressWriter(directory)
        # What it saves, and what it resumes from.
        planned, before = planned_footprint(directory), read(directory)
        estimate = planned or Footprint()
        space = Space(
            directory,
            Share(directory, storage),
            estimate=(estimate.checkpoint_bytes, estimate.final_bytes),
            reserve=storage.reserve,
            peak=before.bytes_peak if before else 0,
        )
        self.store = CheckpointStore(directory, collectives, self.record, space, say=self.say)
        self.store.room.retention.milestone_every = checkpoint.milestone_every
        self._resuming = Resuming(directory, collectives, self.store, checkpoint.allow, self.say)
        limit = CheckpointLimit(self.store, storage, planned, self.record, self.say)
        self._saver = Saver(collectives, self.store, limit, self._resuming, checkpoint, self.record, self.say)
        self._bytes_watch = BytesWatch(directory, self.store, identity.attempt, self.record, self.say)
        self.kept = Kept(self.rank, self.say)
        """What :meth:`keep` was given."""
        self._newest: Sealed | None = None
        # How it stops.
        self._cause = StopCause(directory, identity, guard, preemption, self.say)
        self._outcome = Outcome(directory, identity, preemption, self._recorder, _print)
        self._shutdown = Shutdown(identity, guard, self._cause, self._outcome, preemption, self._recorder, _print)
        self._planner = Planner(preemption.lead_s, limit.expected_bytes)
        self._channel = ControlChannel(self.rank, collectives.world_size)
        self._agreement = agreement = StepAgreement(self._channel, self._on_stop_asked)
        self._watchdog = Watchdog(
            guard, collectives, self._channel, agreement, self._cause, self._shutdown, self._outcome, preemption
        )
        self.steps = Steps(
            guard,
            collectives,
            agreement,
            self._cause,
            self._planner,
            self._shutdown,
            self._watchdog,
            self._saver,
            self._bytes_watch,
        )
        self._leave_in_startup = LeaveInStartup(identity, self._cause, self._shutdown, self._outcome, self.store)
        guard.notify(on_startup=self._leave_in_startup, on_signal=self.steps.on_signal)
        if self.rank == 0:
            self._open()
        if guard.requested is not None:
            self._leave_in_startup(guard.requested)  # it came before there was an attempt to leave
        if collectives.world_size > 1:
            keep_one_layout()

    @property
    def rank(self) -> int:
        """This process's rank, from 0."""
        return self.collectives.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.collectives.world_size

    @property
    def moved(self) -> bool:
        """Whether the run's first attempt had another number of ranks, so that the rows of a step are dealt anew."""
        return self._resuming.moved

    @property
    def attempt(self) -> int:
        """The attempt's number, from 1."""
        return self._identity.attempt

    @property
    def final(self) -> Path:
        """Where the finished model goes."""
        return self.directory.final

    @property
    def stopping(self) -> bool:
        """Whether all ranks have agreed to save and leave."""
        return self._shutdown.signal is not None

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process was told to stop, whatever the ranks have agreed on."""
        return self._guard.requested is not None

    @property
    def layout(self) -> Layout:
        """How the rows of each optimizer step are spread; only if :meth:`describe` was told the `accumulation`."""
        return self._resuming.layout

    def say(self, text: str) -> None:
        """Print a line in the log (rank 0 only)."""
        if self.rank == 0:
            _print(text)

    def record(self, event: str, **values: Any) -> None:
        """Append a line to the ledger (rank 0 only). On a full disk it is kept, and written with the next."""
        if self.rank == 0:
            self._recorder(event, **values)

    def describe(self, **origin: Any) -> None:
        """Say what this run is, as far as a checkpoint depends on it; to be called before :meth:`resume_point`.

        Args:
            origin: any of `dataset`, `seed`, `global_batch`, `micro_batch`, `trainable`, `config`, `source`, `length`,
                `settings`, plain values; `checkpoint/compatibility.py` has what follows if one differs on resume. With
                `accumulation` in the place of `global_batch`, the loop takes it from `run.layout` afterwards: that
                suits another number of ranks.
        """
        self._resuming.describe(**origin)

    def keep(self, name: str, obj: Any) -> None:
        """Save the state of `obj` in each checkpoint, and set it again when the run resumes.

        Each rank saves its own. It is set by :meth:`begin` (with a Trainer, when training begins); of an object that is
        given later, at once.

        Args:
            name: by which it is found again; the same in each attempt.
            obj: an object with `state_dict()` and `load_state_dict(state)`, or a random generator of Python, NumPy or
                torch. A state is made of numbers, text, tensors, arrays, and lists or dicts of them.

        Raises:
            ConfigError: the name is taken, or the state can't be saved.
            CheckpointError: the object can't take the state that was saved for it.
        """
        self.kept.add(name, obj)

    def accepts(self, name: str, difference: str) -> bool:
        """Whether the user accepts a difference of this name (`checkpoint.allow`); it is then noted."""
        return self._resuming.accepts(name, difference)

    def _open(self) -> None:
        """Write down that the attempt starts, after seeing to the one before it (rank 0)."""
        job = self._identity.job
        reason = end_previous_attempt(self.directory, self.attempt, job, self._preemption, self.say)
        if reason is not None:
            self._outcome.gave_up(reason)
            raise SystemExit(int(Exit.GAVE_UP))
        self.store.clean_up()
        write_start(self.directory, self._identity, self.record, self.say)
        self._bytes_watch.begin()
        self.progress.now.attempt = self.attempt
        self.update_progress(phase="starting")
        view = self._cause.ask_for_limits()
        self._warn_of_short_notice()
        if view is not None and view.preempt_time is not None and view.preempt_time >= (view.start_time or 0.0):
            self._leave_in_startup("TERM")  # its signal came before this process could catch one

    def resume_point(self) -> Sealed | None:
        """The newest checkpoint that verifies, or None on a fresh run. All ranks call it together.

        Raises:
            ResumeRefusedError: it was made by another run than this one; the message says what to do.
        """
        self._identity.attempt = self.collectives.from_rank_0(self.attempt)
        self._connect()
        self._newest = self._resuming.find()
        if self._newest is not None:
            self.kept.read(self._newest)
            self._shutdown.saved_step = self._newest.step
        return self._newest

    def _connect(self) -> None:
        """Connect the ranks, so that they can ask for a stop and watch each other. All call it together."""
        self._channel.connect(self.collectives, self._watchdog.receive, self._watchdog.tick)

    def _on_stop_asked(self, name: str) -> None:
        """Note that some rank has asked for a stop; called in the channel's thread."""
        self._guard.request(name)
        if self.rank == 0:
            self._cause.ask_why_in_background()

    def begin(self, step: int) -> None:
        """Everything is loaded and `step` optimizer steps are done: training begins. All ranks call it together.

        Raises:
            BudgetError: the budget has no room for the saves to come, by what is there now.
        """
        self._connect()
        self.kept.restore()
        seconds, job = clock.now() - self._started, self._cause.job_times
        if self._newest is not None:
            name, differences = self._newest.path.name, self._resuming.differences
            self.record("resumed", step=step, checkpoint=name, seconds=seconds, differences=differences, **job)
            self.say(f"resumed from {name} after {seconds:.1f} s")
        else:
            self.record("began", step=step, seconds=seconds, **job)
        self.progress.go_on_from(step)
        events = self._ledger.read()
        self._saver.begin(events, periodic=not self.loop_saves)
        self._planner.begin(events)
        self._warn_of_short_notice()
        self._guard.end_startup()
        self.update_progress(phase="training", step=step, force=True)
        if self.steps.should_stop(step):
            self.leave(step)

    def _warn_of_short_notice(self) -> None:
        """Say once if what steps and saves were seen to take is longer than the notice (rank 0)."""
        if self._cause.in_job and self.rank == 0 and (short := self._planner.shortfall(self._cause.notice)):
            text, fields = short
            self.record("notice_short", **fields)
            self.say(f"WARNING: {text}")
            if self._guard.requested is None:
                notification.tell_meanwhile(self.directory, "notice_short", text, self.say)

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
        if self._newest is not None and self._newest.step == step:
            if pending_evaluation and self.rank == 0:
                self.store.mark_pending(step)
            self.collectives.barrier()
            return self._newest
        self.update_progress(phase="saving", step=step, force=True)
        began = time.monotonic()

        def write(directory: Path) -> None:
            save(directory)
            self.kept.write(directory)

        sealed = self.steps.divergence.guarded(self._saver.save)(
            step,
            write,
            kind=Kind.EMERGENCY if self.stopping else Kind.PERIODIC,
            asked_at=self._shutdown.asked_at if self.stopping else None,
            pending_evaluation=pending_evaluation,
            best_step=best_step,
        )
        if sealed is not None:
            self._newest, self._shutdown.saved_step = sealed, step
            self.progress.now.checkpoint_step, self.progress.now.checkpoint_time = step, time.time()
            self._planner.saved(time.monotonic() - began)
            self._warn_of_short_notice()
        self.update_progress(phase="training", force=True)
        return sealed

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Note an evaluation that ran to its end."""
        self.record("evaluated", step=step, metrics=metrics)
        self._planner.mark()

    def leave(self, step: int) -> NoReturn:
        """Requeue the job, once, and end this process; all ranks call it together, everything being saved."""
        self._watchdog.all_saved()
        code = int(self._shutdown.requeue(step)) if self.rank == 0 else int(Exit.RESUME_ME)
        if self.rank == 0:
            self._watchdog.leaving(Exit(code))
        try:
            code = self.collectives.from_rank_0(code)
            self.collectives.close()
        finally:  # the requeue may have ended a peer already: what is saved is saved, and this rank leaves
            self._lock.release()
            exit_at_once(code)

    def finish(self, step: int, save: Callable[[Path], None] | None = None, *, weights_step: int | None = None) -> None:
        """The run is done after `step` steps: publish the model and say so. All ranks call it together.

        Args:
            save: called on every rank with an existing directory; writes the finished model into it.
            weights_step: the step that its weights are from, if that is the best by the metric; None: the last.

        Raises:
            OutlastError: the model (`CheckpointError`) or the ledger can't be written; the run is not finished.
        """
        of = step if weights_step is None else weights_step
        publish = self.steps.divergence.guarded(self._saver.save)
        if save is not None and publish(of, save, kind=Kind.FINAL, best_step=weights_step) is None:
            raise CheckpointError(f"the finished model could not be written to {self.final}; the same command resumes")
        self.collectives.barrier()
        self._watchdog.close()
        if self.rank == 0:
            self._bytes_watch.end()
            first = attempts(self._ledger.read())[0].started
            seconds = clock.now() - min(first["time"] if first else self._started, self._started)
            self._outcome.finished(step)
            self.update_progress(phase="done", step=step, force=True)
            # The very last: who finds it has nothing to clear up.
            self.record("finished", step=step, seconds=seconds, model_step=of)
            if self._recorder.waiting:
                raise OutlastError(f"{self._ledger.path} can't be written, so the run does not count as finished")
        which = "the model" if weights_step is None else f"the best model, of step {weights_step},"
        self.say(f"finished at step {step}; {which} is in {self.final}")
        self._lock.release()

    def fail(self, error: BaseException) -> int:
        """Write down that this attempt ended by an exception; returns the exit code."""
        lost = self._watchdog.blame(error)
        repeats = lost is None and not self.steps.made_one and will_repeat(error)
        cause = LostRankError([lost]) if lost is not None else error
        return self._shutdown.fail(cause, self._agreement.step, repeats=repeats)

    def update_progress(self, *, force: bool = False, **values: Any) -> None:
        """Show where the run is: fields of :class:`Progress` (rank 0 only)."""
        if self.rank == 0:
            if force and values.get("phase") != "saving":  # what it adds is counted when it is there
                space = self.store.space
                values |= {"bytes_used": space.used(), "bytes_peak": space.peak, "budget_bytes": space.budget()}
            self.progress.update(force=force, **values)


def _print(text: str) -> None:
    print(f"[outlast] {text}", flush=True)
