"""Why this attempt stops, until when it may go on, and what follows; rank 0 writes it down and acts."""

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from outlast.config.sections import PreemptionSection
from outlast.errors import Exit, OutlastError, SlurmError
from outlast.ranks.collectives import world_size
from outlast.ranks.lost import Lost, LostRankError
from outlast.rundir.directory import cancelled_after
from outlast.rundir.ledger import Cause, Ledger, Record
from outlast.slurm.actions import bring_forward, requeue_job
from outlast.slurm.environment import SlurmJob
from outlast.slurm.view import JobView, Notice, show_job

from .policy import decide
from .signals import PreemptionGuard

SETTLES_ENV = "OUTLAST_SETTLES"
"""Set by `prologue.sh`: the batch script calls `outlast.epilogue` when the ranks are gone."""
ELASTIC_ENV = "TORCHELASTIC_RUN_ID"
"""Set by torch's agent for its ranks, under `accelerate launch` and `torchrun`."""
ECHO_S = 2.0
"""A rank whose peer has died sees its connection break at once, and a moment later `srun`'s TERM. It waits for that, so
that the ledger gets the cause and not the effect."""


class Departure:
    """One attempt's way out.

    Args:
        record: appends to the ledger.
        say: prints a line in the log.
        job: the Slurm job around this process, or None.
        attempt: its number.
        speaks: whether this rank writes down and does what follows, for all; set later where it stands in for rank 0.
    """

    def __init__(
        self,
        record: Record,
        say: Callable[[str], None],
        ledger: Ledger,
        job: SlurmJob | None,
        preemption: PreemptionSection,
        attempt: int = 1,
        speaks: bool = True,
    ) -> None:
        self.attempt, self.speaks = attempt, speaks
        self.lost: list[Lost] = []
        """Ranks that are the reason, if the others have to leave without having saved."""
        self.ended_it = False
        """Whether it was this rank that wrote down how the attempt ended."""
        self._append, self._print, self._ledger, self._job = record, say, ledger, job
        self._preemption = preemption
        self._since = time.time()
        self._view: JobView | None = None
        self.notice: Notice | None = None
        """What Slurm gives this job between a signal and the kill."""
        self.deadline: float | None = None
        """When the job will be killed, once it has been asked to stop; Unix seconds; None: nobody knows."""
        self._asking = threading.Lock()
        self._requeueing, self._failing = threading.Lock(), threading.Lock()
        self._code: Exit | None = None
        self._requeued_at: float | None = None
        self._failed: Exit | None = None
        self.signal: str | None = None
        """Name of the signal that the ranks agreed on; None while they train."""
        self.asked_at = 0.0
        """When it came, Unix seconds."""

    def _record(self, event: str, **values: Any) -> None:
        if self.speaks:
            self._append(event, **values)

    def _say(self, text: str) -> None:
        if self.speaks:
            self._print(text)

    def ask_slurm(self) -> None:
        """Ask, while the signal is fresh, why it came and how long there is. Runs beside the training step."""
        if self._job is not None:
            with self._asking:
                if self._view is None:
                    try:
                        self._view = show_job(self._job.job_id, timeout_s=10.0)
                    except SlurmError as error:
                        self._say(f"Slurm did not say why: {error}")

    def announce(self, signal: str, guard: PreemptionGuard, step: int, *, once: bool = False, **more: bool) -> None:
        """The ranks have agreed to stop after `step`.

        Args:
            once: another rank may have noted that already.
        """
        self.signal, self.asked_at = signal, guard.requested_at or time.time()
        if self.speaks:
            asking = threading.Thread(target=self.ask_slurm, daemon=True)
            asking.start()
            asking.join(timeout=2.0)  # the save must not wait for a controller that does not answer
        self.deadline = self.deadline_by(guard)
        deadline_s = None if self.deadline is None else round(self.deadline - self.asked_at, 3)
        if once and any(e["event"] == "signal" and e["attempt"] == self.attempt for e in self._ledger.read()):
            return
        self._record("signal", name=signal, step=step, deadline_s=deadline_s, **more)
        left = f" ({deadline_s:.0f} s left)" if deadline_s is not None else ""
        self._say(f"{signal}: saving step {step} and leaving{left}")

    def deadline_by(self, guard: PreemptionGuard) -> float | None:
        """When the job will be killed, as far as that is known by now; Unix seconds.

        Where Slurm does not say why the job was signalled, the time limit says nothing of it: then it is what the user
        has said (`preemption.grace_s`); while Slurm has not answered, also what it gives at a preemption.
        """
        asked_at, view, limit = guard.requested_at or time.time(), self._view, guard.end_time
        if self._job is None or guard.requested == "clock":
            return limit
        if view and view.is_ending:  # then its end is when that began
            wait_s = self.notice.kill_wait_s if self.notice else None
            return None if wait_s is None else asked_at + wait_s
        if view and self._stop_cause() is not None:
            return view.end_time
        grace_s = self._preemption.grace_s
        if grace_s is None and view is None and self.notice is not None:
            grace_s = self.notice.preemption_s
        return None if grace_s is None else min(asked_at + grace_s, limit or math.inf)

    def left_to_settle(self) -> bool:
        """Whether this signal may be the echo of another rank's death, and the batch script will find out.

        `srun` sends TERM to the other ranks when one has died, and Slurm then says of the job what it says when
        somebody has sent a signal on purpose: nothing. Where all ranks still agree, none has died; where they can't,
        only the batch script sees how each of them ended.
        """
        if self._job is None or SETTLES_ENV not in os.environ:
            return False
        self.ask_slurm()
        return self._view is None or self._stop_cause() is None

    def may_be_echo(self) -> bool:
        """Whether a rank has died, and TERM may be the answer to that of what has started the ranks.

        `srun` does so, and torch's agent. Where there is a batch script, it sees how each of them ended.
        """
        died = any(one.how == "gone" for one in self.lost)
        return died and (SETTLES_ENV in os.environ or (self._job is None and ELASTIC_ENV in os.environ))

    def cause(self) -> Cause:
        """Why, by what Slurm said; without an answer, by what the signal alone can tell."""
        if self._job is None:
            return "preempted"
        if cancelled_after(self._ledger.path.parent, self._since):
            return "cancelled"
        self.ask_slurm()
        if self._view is None:
            return "time_limit" if self.signal == "clock" else "preempted"
        # a signal that was sent on purpose means that the nodes are wanted
        return self._stop_cause() or ("time_limit" if self.signal == "clock" else "preempted")

    def requeue(self, step: int) -> Exit:
        """Say why the attempt ended and, by the policy, have Slurm start the next one, on rank 0.

        Once: a requeue makes Slurm end the other ranks, and what this rank then raises ends here a second time. If that
        was some time ago (`watch.py`: a save that needed longer), the next start is brought forward anew.

        Returns:
            The exit code for all ranks.
        """
        with self._requeueing:
            if self._code is None:
                self._code = self._requeue(step)
            elif self._requeued_at is not None and time.monotonic() - self._requeued_at > 1.0:
                self._requeued_at = time.monotonic()
                assert self._job is not None
                with suppress(SlurmError):
                    bring_forward(self._job, self._preemption.requeue_delay_s)
            return self._code

    def fail(self, error: BaseException, guard: PreemptionGuard, rank: int, step: int) -> Exit:
        """Note that rank `rank` has raised `error` in the middle of `step`; see `Run.fail`. On any rank, and once.

        Returns:
            The exit code for this rank.
        """
        with self._failing:
            if self._failed is None:
                self._failed = self._fail(error, guard, rank, step)
            return self._failed

    def _fail(self, error: BaseException, guard: PreemptionGuard, rank: int, step: int) -> Exit:
        refused = isinstance(error, OutlastError)
        if not refused and SETTLES_ENV in os.environ and world_size() > 1:
            deadline = time.monotonic() + ECHO_S
            while guard.requested is None and time.monotonic() < deadline:
                time.sleep(0.05)
        # Without a job nobody else will say which rank died, and that it was no preemption.
        died = isinstance(error, LostRankError) and self._job is None and self.may_be_echo()
        stopping = None if died else guard.requested
        if stopping is not None and rank != 0:
            return Exit.RESUME_ME  # rank 0 speaks for all
        if stopping is not None and not refused:
            self._say(f"{type(error).__name__} while leaving: {error}")
            if self.left_to_settle():
                return Exit.FAILED
            if self.signal is None:
                self.announce(stopping, guard, step)
            return self.requeue(step)
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
        cause: Cause = "out_of_memory" if memory else "failed"
        if isinstance(error, LostRankError):
            self._end(cause, step=step, rank=error.rank, detail=str(error))
            if self._job is not None and self.ended_it and SETTLES_ENV not in os.environ:
                return self._follow(cause, step)  # it may be its node's fault
            return Exit.FAILED
        self._end(cause, step=step, rank=rank, error=f"{type(error).__name__}: {error}"[:2000], refused=refused)
        return error.exit_code if isinstance(error, OutlastError) else Exit.FAILED

    def is_settled(self) -> bool:
        """Whether the ledger says that the attempt has ended and that what follows has been seen to."""
        own = [event for event in self._ledger.read() if event["attempt"] == self.attempt]
        if any(event["event"] in ("requeued", "gave_up") for event in own):
            return True
        stays = self._job is None  # then a launcher sees to it
        return any(e["event"] == "attempt_ended" and (stays or e["cause"] in ("cancelled", "finished")) for e in own)

    def _end(self, cause: Cause, **values: Any) -> None:
        """Note how the attempt ended, unless another rank has. A full disk must not hide what went wrong."""
        before: list[tuple[str, dict[str, Any]]] = [("straggler", asdict(one)) for one in self.lost]
        try:
            self.ended_it = self._ledger.append_first(
                "attempt_ended", self.attempt, before=before, cause=cause, **values
            )
        except OSError:
            self.ended_it = True
            for name, fields in [*before, ("attempt_ended", {"cause": cause, **values})]:
                self._record(name, **fields)  # they wait

    def note_late(self, one: Lost) -> None:
        """Note a rank that has kept the others waiting."""
        self._record("straggler", **asdict(one))
        self._say(f"WARNING: {one}")

    def _requeue(self, step: int) -> Exit:
        cause = self.cause()
        if self._job is not None and cause == "preempted":
            cause = self._still_preempted()
        self._end(cause, step=step, **({"detail": "; ".join(map(str, self.lost))} if self.lost else {}))
        return self._follow(cause, step) if self.ended_it else Exit.RESUME_ME

    def _follow(self, cause: Cause, step: int) -> Exit:
        """Do what the policy says of an attempt that this rank has noted as ended."""
        decision = decide(cause, self._ledger.read(), self._preemption)
        if decision.action == "give_up":
            self._record("gave_up", reason=decision.reason)
            self._say(f"giving up: {decision.reason}")
        elif decision.action == "again" and self._job is not None:
            try:
                done = requeue_job(self._job, self._preemption.requeue_delay_s)
                self._requeued_at = time.monotonic()
            except SlurmError as error:
                what = "the batch script looks for another way" if SETTLES_ENV in os.environ else "submit it again"
                self._say(f"could not requeue: {error}; step {step} is saved, {what}")
            else:
                self._record("requeued", cause=cause, job_id=self._job.job_id, by=done.by, hold_lifted=done.hold_lifted)
                self._say(f"requeued job {self._job.job_id} ({cause})")
        return decision.exit_code

    def _still_preempted(self) -> Cause:
        """What has become of a preempted job during the save: it may have been cancelled meanwhile, and must stay so.

        A job that was in its grace period and is completing before the end of it, without being back in the queue,
        was cancelled. With `PreemptMode=CANCEL` it looks the same after the end, and must then be requeued.
        """
        assert self._job is not None
        first = self._view
        try:
            self._view = show_job(self._job.job_id, timeout_s=5.0)
        except SlurmError:
            return "preempted"
        now = self._view
        restarted = now.restarts > self._job.restart_count
        in_grace = first is not None and not first.is_ending and time.time() < (first.end_time or 0.0) - 1.0
        if now.is_ending and not restarted and (in_grace or not now.is_preempted):
            return "cancelled"
        return "preempted"

    def _stop_cause(self) -> Cause | None:
        assert self._view is not None
        assert self._job is not None
        return self._view.stop_cause(self._job, self._preemption.lead_s)
