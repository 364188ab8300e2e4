"""Records how the previous attempt ended if nobody could: it was killed with its node or its job."""

from collections.abc import Callable
from contextlib import suppress

from outlast.config.preemption import PreemptionSection
from outlast.errors import SlurmError
from outlast.rundir.attempts import Attempt, attempts
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import KILLED, Cause, Ledger
from outlast.slurm.environment import SlurmJob
from outlast.slurm.view import STATE_CAUSES, accounted_state, restart_cause, show_job

from .outcome import Outcome
from .policy import decide, since_submission, startup_warning


def end_previous_attempt(
    run: RunDirectory, number: int, job: SlurmJob | None, limits: PreemptionSection, say: Callable[[str], None]
) -> str | None:
    """Write down how the attempt before attempt `number` ended and why this one follows (rank 0).

    Slurm starts a job again by itself when a node has failed, or when it was preempted and did not requeue itself:
    this is where that meets the requeue policy.

    Returns:
        Why this attempt must not go on, or None. The policy is asked only of a restart that was Slurm's own.
    """
    ledger = Ledger(run.ledger)
    before = [attempt for attempt in attempts(ledger.read()) if attempt.number < number]
    if not before:
        return None
    last = before[-1]
    outcome = Outcome.of(run, last.number, limits, say)
    if last.ended is None:
        outcome.ended(_cause(last, job), detail=KILLED)
    if warning := startup_warning(since_submission(ledger.read())):
        say(f"WARNING: {warning}")
    if job is None or last.requeued is not None or not _same_job(last, job):
        return None
    events = ledger.read()
    cause: Cause = next(a for a in attempts(events) if a.number == last.number).ended["cause"]  # type: ignore[index]
    decision = decide(cause, events, limits)
    if decision.action in ("give_up", "fail"):  # only reached when Slurm itself has restarted the job
        return decision.reason
    if decision.action in ("again", "stop"):  # whoever brings a cancelled job back means it
        outcome.requeued(cause, job_id=job.job_id, by="slurm")
    return None


def _same_job(last: Attempt, job: SlurmJob) -> bool:
    return last.started is not None and last.started["job_id"] == job.job_id


def _cause(last: Attempt, job: SlurmJob | None) -> Cause:
    if last.started is None or last.started["job_id"] is None:
        return "failed"
    started, restarts = last.started["job_id"], last.started["restart_count"]
    its = SlurmJob(str(started), int(restarts), ",".join(last.started["hosts"]))
    if job is not None and _same_job(last, job):
        now = None
        with suppress(SlurmError):
            now = show_job(job.job_id, timeout_s=5.0)
        return restart_cause(its, last.started["time"], now, signalled=bool(last.signals))
    return STATE_CAUSES.get(accounted_state(its) or "", "failed")
