"""Why this attempt stops, until when it may go on, and what follows; rank 0 writes it down and acts."""

import os
import threading
import time
from collections.abc import Callable

from . import slurm
from .errors import Exit, OutlastError, SlurmError
from .ledger import Cause, Ledger, Record
from .preemption import PreemptionGuard
from .ranks import world_size
from .requeue import decide
from .rundir import cancelled_after
from .sections import PreemptionSection

SETTLES_ENV = "OUTLAST_SETTLES"
"""Set by `prologue.sh`: the batch script calls `outlast.settle` when the ranks are gone."""
ECHO_S = 2.0
"""A rank whose peer has died sees its connection break at once, and a moment later `srun`'s TERM. It waits for that, so
that the ledger gets the cause and not the effect."""


class Departure:
    """One attempt's way out.

    Args:
        record: appends to the ledger (on rank 0; elsewhere it does nothing).
        say: prints a line in the log (likewise).
        job: the Slurm job around this process, or None.
    """

    def __init__(
        self,
        record: Record,
        say: Callable[[str], None],
        ledger: Ledger,
        job: slurm.SlurmJob | None,
        preemption: PreemptionSection,
    ) -> None:
        self._record, self._say, self._ledger, self._job = record, say, ledger, job
        self._preemption = preemption
        self._since = time.time()
        self._view: slurm.JobView | None = None
        self._asking = threading.Lock()
        self._requeueing = threading.Lock()
        self._code: Exit | None = None
        self.signal: str | None = None
        """Name of the signal that the ranks agreed on; None while they train."""
        self.asked_at = 0.0
        """When it came, Unix seconds."""

    def ask_slurm(self) -> None:
        """Ask, while the signal is fresh, why it came and how long there is. Runs beside the training step."""
        if self._job is not None:
            with self._asking:
                if self._view is None:
                    try:
                        self._view = slurm.show_job(self._job.job_id, timeout_s=10.0)
                    except SlurmError as error:
                        self._say(f"Slurm did not say why: {error}")

    def announce(self, signal: str, guard: PreemptionGuard, step: int, **more: bool) -> None:
        """The ranks have agreed to stop after `step`."""
        self.signal, self.asked_at = signal, guard.requested_at or time.time()
        asking = threading.Thread(target=self.ask_slurm, daemon=True)
        asking.start()
        asking.join(timeout=2.0)  # the save must not wait for a controller that does not answer
        end = self._view.end_time if self._view else guard.end_time
        deadline_s = round(end - self.asked_at, 3) if end is not None else None
        self._record("signal", name=signal, step=step, deadline_s=deadline_s, **more)
        left = f" ({deadline_s:.0f} s left)" if deadline_s is not None else ""
        self._say(f"{signal}: saving step {step} and leaving{left}")

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

    def cause(self) -> Cause:
        """Why, by what Slurm said; without an answer, by what the signal alone can tell."""
        if self._job is None:
            return "preempted"
        if cancelled_after(self._ledger.path.parent, self._since):
            return "cancelled"
        self.ask_slurm()
        if self._view is None:
            return "time_limit" if self.signal == "clock" else "preempted"
        return self._stop_cause() or "preempted"  # a signal that was sent on purpose means the same

    def requeue(self, step: int) -> Exit:
        """Say why the attempt ended and, by the policy, have Slurm start the next one, on rank 0.

        Once: a requeue makes Slurm end the other ranks, and what this rank then raises ends here a second time.

        Returns:
            The exit code for all ranks.
        """
        with self._requeueing:
            if self._code is None:
                self._code = self._requeue(step)
            return self._code

    def fail(self, error: BaseException, guard: PreemptionGuard, rank: int, attempt: int, step: int) -> Exit:
        """Note that rank `rank` has raised `error` in the middle of `step`; see `Run.fail`. On any rank.

        Returns:
            The exit code for this rank.
        """
        refused = isinstance(error, OutlastError)
        if not refused and SETTLES_ENV in os.environ and world_size() > 1:
            deadline = time.monotonic() + ECHO_S
            while guard.requested is None and time.monotonic() < deadline:
                time.sleep(0.05)
        if guard.requested is not None and rank != 0:
            return Exit.RESUME_ME  # rank 0 speaks for all
        if guard.requested is not None and not refused:
            self._say(f"{type(error).__name__} while leaving: {error}")
            if self.left_to_settle():
                return Exit.FAILED
            self.announce(guard.requested, guard, step)
            return self.requeue(step)
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
        try:
            self._ledger.append_first(
                "attempt_ended",
                attempt,
                cause="out_of_memory" if memory else "failed",
                step=step,
                rank=rank,
                error=f"{type(error).__name__}: {error}"[:2000],
                refused=refused,
            )
        except OSError as full:  # it must not hide what went wrong
            self._say(f"WARNING: the ledger can't be written: {full}")
        return error.exit_code if isinstance(error, OutlastError) else Exit.FAILED

    def _requeue(self, step: int) -> Exit:
        cause = self.cause()
        if self._job is not None and cause == "preempted":
            cause = self._still_preempted()
        self._record("attempt_ended", cause=cause, step=step)
        decision = decide(cause, self._ledger.read(), self._preemption)
        if decision.action == "give_up":
            self._record("gave_up", reason=decision.reason)
            self._say(f"giving up: {decision.reason}")
        elif decision.action == "again" and self._job is not None:
            try:
                done = slurm.requeue(self._job, self._preemption.requeue_delay_s)
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
            self._view = slurm.show_job(self._job.job_id, timeout_s=5.0)
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
