"""The requeue policy, and what rank 0 does by it when an attempt ends early."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import slurm
from .errors import Exit, SlurmError
from .ledger import Cause, Event, Ledger, Record, attempts
from .preemption import PreemptionGuard
from .sections import PreemptionSection

PATIENCE = 3
"""Restarts in a row without one new step, after which a run gives up."""


@dataclass(frozen=True)
class Decision:
    """`requeue`: start again. `stop`: saved, and left to the user. `give_up`: restarting does not help."""

    action: Literal["requeue", "stop", "give_up"]
    reason: str


def decide(cause: Cause, events: list[Event], max_requeues: int) -> Decision:
    """What follows an attempt that ended with `cause`.

    | cause | then |
    |---|---|
    | preempted, time_limit, node_failure | requeue, unless one of the two limits below is reached |
    | cancelled | stop: somebody wanted that |
    | failed, finished | stop |

    Args:
        events: the run's ledger, the `attempt_ended` of this attempt included.
        max_requeues: requeues that the run is allowed over its whole life.
    """
    if cause not in ("preempted", "time_limit", "node_failure"):
        return Decision("stop", cause)
    requeues = sum(event["event"] == "requeued" for event in events)
    if requeues >= max_requeues:
        return Decision("give_up", f"{requeues} requeues; preemption.max_requeues is {max_requeues}")
    steps = [attempt.saved_step for attempt in attempts(events)]
    if len(steps) > PATIENCE and max(steps[-PATIENCE:]) <= steps[-PATIENCE - 1]:
        return Decision(
            "give_up", f"no progress in {PATIENCE} restarts: none saved a step after {steps[-PATIENCE - 1]}"
        )
    return Decision("requeue", cause)


class Departure:
    """Why this attempt stops, until when it may go on, and what follows; rank 0 writes it down and acts.

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

    def announce(self, signal: str, guard: PreemptionGuard, step: int) -> None:
        """The ranks have agreed to stop after `step`."""
        self.signal, self.asked_at = signal, guard.requested_at or time.time()
        asking = threading.Thread(target=self.ask_slurm, daemon=True)
        asking.start()
        asking.join(timeout=2.0)  # the save must not wait for a controller that does not answer
        end = self._view.end_time if self._view else guard.end_time
        deadline_s = round(end - self.asked_at, 3) if end is not None else None
        self._record("signal", name=signal, step=step, deadline_s=deadline_s)
        left = f" ({deadline_s:.0f} s left)" if deadline_s is not None else ""
        self._say(f"{signal}: saving step {step} and leaving{left}")

    def cause(self) -> Cause:
        """Why, by what Slurm said; without an answer, by what the signal alone can tell."""
        if self._job is None:
            return "preempted"
        self.ask_slurm()
        if self._view is None:
            return "time_limit" if self.signal == "clock" else "preempted"
        return self._view.stop_cause(self._preemption.lead_s)

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

    def _requeue(self, step: int) -> Exit:
        cause, ours = self.cause(), True
        if self._job is not None and cause == "preempted":
            cause, ours = self._still_preempted()
        self._record("attempt_ended", cause=cause, step=step)
        decision = decide(cause, self._ledger.read(), self._preemption.max_requeues)
        if decision.action == "give_up":
            self._record("gave_up", reason=decision.reason)
            self._say(f"giving up: {decision.reason}")
            return Exit.GAVE_UP
        if decision.action == "requeue" and self._job is not None and not ours:
            self._record("requeued", cause=cause, job_id=self._job.job_id, by="slurm")
        elif decision.action == "requeue" and self._job is not None:
            try:
                lifted = slurm.requeue(self._job.job_id, self._preemption.requeue_delay_s)
            except SlurmError as error:
                self._say(f"could not requeue: {error}. The same command again resumes from step {step}.")
            else:
                self._record("requeued", cause=cause, job_id=self._job.job_id, hold_lifted=lifted)
                self._say(f"requeued job {self._job.job_id} ({cause})")
        return Exit.RESUME_ME

    def _still_preempted(self) -> tuple[Cause, bool]:
        """What became of the job during the save, and whether requeueing it is still ours to do.

        A job that is completing by now was either cancelled meanwhile, and must stay so, or has used up its grace
        period, and Slurm requeues it.
        """
        assert self._job is not None
        try:
            now = slurm.show_job(self._job.job_id, timeout_s=5.0)
        except SlurmError:
            return "preempted", True
        if not now.is_ending:
            return "preempted", True
        return ("preempted", False) if now.is_preempted else ("cancelled", False)
