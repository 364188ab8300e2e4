"""The attempt before this one, if nobody could say how it ended: killed with its node, or with the whole job."""

from outlast.config.sections import PreemptionSection
from outlast.rundir.attempts import Attempt, attempts
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Cause, Ledger
from outlast.rundir.progress import read
from outlast.slurm.environment import SlurmJob
from outlast.slurm.view import STATE_CAUSES, accounted_state, restart_cause

from .policy import Decision, decide


def settle_predecessor(
    run: RunDirectory, number: int, job: SlurmJob | None, limits: PreemptionSection
) -> Decision | None:
    """Write down how the attempt before attempt `number` ended and why this one follows. On rank 0.

    Slurm starts a job again by itself when a node has failed, or when it was preempted and did not requeue itself:
    this is where that meets the requeue policy.

    Returns:
        What the policy says of a restart that was Slurm's own; None if the one before had seen to it.
    """
    ledger = Ledger(run.ledger)
    before = [attempt for attempt in attempts(ledger.read()) if attempt.number < number]
    if not before:
        return None
    last = before[-1]
    if last.ended is None:
        progress = read(run)
        step = progress.step if progress and progress.attempt == last.number else last.last_step
        ledger.append("attempt_ended", last.number, cause=_cause(last, job), step=step, detail="killed")
    if job is None or last.requeued is not None or not _same_job(last, job):
        return None
    events = ledger.read()
    cause: Cause = next(a for a in attempts(events) if a.number == last.number).ended["cause"]  # type: ignore[index]
    decision = decide(cause, events, limits)
    if decision.action in ("again", "stop"):  # whoever brings a cancelled job back means it
        ledger.append("requeued", last.number, cause=cause, job_id=job.job_id, by="slurm")
    return decision


def _same_job(last: Attempt, job: SlurmJob) -> bool:
    return last.started is not None and last.started["job_id"] == job.job_id


def _cause(last: Attempt, job: SlurmJob | None) -> Cause:
    if last.started is None or last.started["job_id"] is None:
        return "failed"
    started, restarts = last.started["job_id"], last.started["restart_count"]
    its = SlurmJob(str(started), int(restarts), ",".join(last.started["hosts"]))
    if job is not None and _same_job(last, job):
        return restart_cause(its)
    return STATE_CAUSES.get(accounted_state(its) or "", "failed")
