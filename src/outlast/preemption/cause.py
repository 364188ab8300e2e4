"""Asks Slurm, while the signal is fresh, why this attempt has to stop and until when it may go on."""

import math
import threading
from collections.abc import Callable
from contextlib import suppress

from outlast import clock
from outlast.config.preemption import PreemptionSection
from outlast.errors import SlurmError
from outlast.ranks.identity import Identity
from outlast.rundir.cancelled import CancelMark
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Cause
from outlast.slurm.view import JobView, Notice, end_time_of, notice_of, show_job

from .signals import CLOCK, PreemptionGuard


class StopCause:
    """What Slurm says of this attempt's job. Outside Slurm it knows nothing, and says "preempted".

    Args:
        say: prints a line in the log.
    """

    def __init__(
        self,
        run: RunDirectory,
        identity: Identity,
        guard: PreemptionGuard,
        preemption: PreemptionSection,
        say: Callable[[str], None],
    ) -> None:
        self._job, self._guard, self._preemption, self._say = identity.around, guard, preemption, say
        self._in_own_job = identity.job is not None
        self._job_began = clock.now()
        self._cancelled = CancelMark(run.path)
        self._asking = threading.Lock()
        self._view: JobView | None = None
        self.end_time: float | None = None
        """When the job reaches its time limit, Unix seconds; None: not known."""
        self.job_times: dict[str, float] = {}
        """When the run's job was queued (`job_submitted`) and got its nodes (`job_started`), Unix seconds."""
        self.notice: Notice | None = None
        """What Slurm gives this job between a signal and the kill; None: not known."""

    @property
    def in_job(self) -> bool:
        """Whether this attempt has a Slurm job of its own."""
        return self._in_own_job

    def ask_for_limits(self) -> JobView | None:
        """Ask for the job's time limit and its notice, as the attempt begins; None: Slurm did not say."""
        if self._job is None:
            return None
        try:
            view = show_job(self._job.job_id, timeout_s=5.0)
        except SlurmError as error:
            self._say(f"Slurm did not say when this job ends ({error}); its signal is what is left")
            return None
        self.end_time = view.end_time
        self._job_began = view.start_time or self._job_began
        times = {"job_submitted": view.submit_time, "job_started": view.start_time}
        if self._in_own_job:
            self.job_times = {name: time for name, time in times.items() if time is not None}
        with suppress(SlurmError):
            self.notice = notice_of(self._job.job_id, self._preemption.grace_s)
        return view

    def limit_was_raised(self, until: float) -> bool:
        """Ask again whether the time limit is later than `until`, Unix seconds: it may have been raised meanwhile."""
        later = end_time_of(self._job.job_id) if self._job is not None else None
        self.end_time = max(self.end_time or 0.0, later or 0.0)
        return self.end_time > until

    def ask_why(self) -> None:
        """Ask, while the signal is fresh, why it came and how long there is."""
        if self._job is not None:
            with self._asking:
                if self._view is None:
                    try:
                        self._view = show_job(self._job.job_id, timeout_s=10.0)
                    except SlurmError as error:
                        self._say(f"Slurm did not say why: {error}")

    def ask_why_in_background(self) -> threading.Thread:
        """Ask in a thread of its own, beside the training step."""
        asking = threading.Thread(target=self.ask_why, name="outlast-why", daemon=True)
        asking.start()
        return asking

    @property
    def is_explained(self) -> bool:
        """Whether what Slurm said explains the signal. It does not if somebody, or `srun`, has sent it on purpose."""
        return self._view is not None and self._by_slurm() is not None

    def cause(self, signal: str | None) -> Cause:
        """Why this attempt stops, by what Slurm said; without an answer, by what the signal alone can tell."""
        if signal == "INT":
            return "cancelled"  # somebody wanted that, and is there
        if self._job is None:
            return "preempted"
        if self._cancelled.is_set:
            return "cancelled"
        self.ask_why()
        if self._view is None:
            return "time_limit" if signal == CLOCK else "preempted"
        # a signal that was sent on purpose means that the nodes are wanted
        return self._by_slurm() or ("time_limit" if signal == CLOCK else "preempted")

    def cause_after_saving(self, signal: str | None) -> Cause:
        """The cause, now that all is saved: the job may have been cancelled meanwhile, and must stay so.

        A signal may also come before Slurm can say why: what it could not explain then, it may by now.
        """
        cause, explained = self.cause(signal), self.is_explained
        if cause == "cancelled" or self._job is None:
            return cause
        if self.is_cancelled():
            return "cancelled"
        return cause if explained or self._view is None else self._by_slurm() or cause

    def is_cancelled(self) -> bool:
        """Whether the job has been cancelled by now, whatever it was signalled for; asked before every requeue."""
        if self._job is None:
            return False
        if self._cancelled.is_set:
            return True
        first = self._view
        try:
            self._view = show_job(self._job.job_id, timeout_s=5.0)
        except SlurmError:
            return False
        return self._view.is_cancelled(self._job, first)

    def deadline(self) -> float | None:
        """When the job will be killed, as far as that is known by now; Unix seconds.

        Where Slurm does not say why the job was signalled, the time limit says nothing of it: then it is what the user
        has said (`preemption.grace_s`); while Slurm has not answered, also what it gives at a preemption.
        """
        asked_at, view = self._guard.requested_at or clock.now(), self._view
        if self._job is None or self._guard.requested == CLOCK:
            return self.end_time
        if view and view.is_ending:  # while a job is ending, its end time is when the ending began
            wait_s = self.notice.kill_wait_s if self.notice else None
            return None if wait_s is None else asked_at + wait_s
        if view and self.is_explained:
            return view.end_time
        grace_s = self._preemption.grace_s
        if grace_s is None and view is None and self.notice is not None:
            grace_s = self.notice.preemption_s
        return None if grace_s is None else min(asked_at + grace_s, self.end_time or math.inf)

    def _by_slurm(self) -> Cause | None:
        assert self._view is not None
        assert self._job is not None
        return self._view.stop_cause(self._job, self._preemption.lead_s, self._job_began)
