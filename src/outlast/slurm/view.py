"""What Slurm says about a job: its state, why it was signalled, how long it has, how it ended."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass

from outlast.errors import SlurmError
from outlast.rundir.ledger import Cause

from .commands import pairs, run_slurm, seconds_of, slurm_timestamp
from .environment import SlurmJob

STATE_CAUSES: dict[str, Cause] = {
    "PREEMPTED": "preempted",
    "REQUEUED": "requeued",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
    "TIMEOUT": "time_limit",
    "DEADLINE": "time_limit",
    "OUT_OF_MEMORY": "out_of_memory",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
}
"""States in which a job may have ended, and what they mean for a run."""


@dataclass(frozen=True)
class JobView:
    """What Slurm says about a job at one moment. Times are Unix seconds."""

    state: str
    reason: str
    preempt_time: float | None
    start_time: float | None
    end_time: float | None
    restarts: int = 0
    """How often the job was requeued; it goes up at that moment, not at the next start."""
    submit_time: float | None = None
    """When it was put into the queue; a requeue puts it there anew."""

    @property
    def is_preempted(self) -> bool:
        """Whether Slurm is taking this attempt's nodes away; the time of an earlier attempt's preemption stays."""
        return self.preempt_time is not None and self.preempt_time >= (self.start_time or 0.0)

    @property
    def is_ending(self) -> bool:
        return self.state == "COMPLETING" or self.state in STATE_CAUSES

    @property
    def is_held(self) -> bool:
        """Whether somebody has put the job back into the queue to stay there (`scontrol requeuehold`)."""
        return self.reason == "job_requeued_in_held_state" or self.state in ("REQUEUE_HOLD", "SPECIAL_EXIT")

    def is_cancelled(self, job: SlurmJob, before: "JobView | None" = None) -> bool:
        """Whether the job has been cancelled, whatever it was signalled for: to be asked before it is requeued.

        A cancelled job is completing, and is not back in the queue. One that has come to its time limit says so; a
        `scancel` after that leaves no trace. A preempted one is completing when its grace period is over, with
        `PreemptMode=CANCEL`; before the end of it, it was cancelled.

        Args:
            before: what Slurm said when the signal came, with the end of the grace period.
        """
        if self.state != "COMPLETING" or self.restarts > job.restart_count or self.reason == "TimeLimit":
            return self.state == "CANCELLED" and self.restarts <= job.restart_count
        if before is not None and before.is_preempted and not before.is_ending:
            return time.time() < (before.end_time or 0.0) - 1.0 or not self.is_preempted
        return not self.is_preempted

    def stop_cause(self, job: SlurmJob, lead_s: float, since: float = math.inf) -> Cause | None:
        """Why this job was signalled, from what Slurm says while the signal is fresh.

        A preempted job is still RUNNING and has a `PreemptTime`, or, without a grace period, is COMPLETING with one;
        a cancelled one is COMPLETING without. A job that Slurm itself has requeued lost a node, or had no
        grace period. At its time limit it says so, or is within `--signal`'s lead (which may come 60 s early) of it.

        Args:
            lead_s: the lead time that `--signal` was given, seconds.
            since: when this start of the job began, Unix seconds.

        Returns:
            None: the job goes on, as far as Slurm is concerned. Then somebody sent the signal on purpose, or `srun`
            did, which ends the other ranks when one has died.
        """
        if self.restarts > job.restart_count:
            return restart_cause(job, since, self)
        if self.is_preempted and self.state != "CANCELLED":
            return "preempted"
        if self.reason == "TimeLimit":
            return "time_limit"
        if self.state in STATE_CAUSES:
            return STATE_CAUSES[self.state]
        if self.is_ending:
            return "cancelled"
        if self.end_time is not None and self.end_time - time.time() <= lead_s + 65.0:
            return "time_limit"
        return None


def show_job(job_id: str, timeout_s: float = 20.0) -> JobView:
    """Ask Slurm about a job.

    Raises:
        SlurmError: no answer within `timeout_s`, or the job is unknown.
    """
    fields = pairs(run_slurm("scontrol", "show", "job", job_id, "-o", timeout_s=timeout_s))
    return JobView(
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", ""),
        preempt_time=slurm_timestamp(fields.get("PreemptTime")),
        start_time=slurm_timestamp(fields.get("StartTime")),
        end_time=slurm_timestamp(fields.get("EndTime")),
        restarts=int(fields.get("Restarts", "0") or 0),
        submit_time=slurm_timestamp(fields.get("SubmitTime")),
    )


def end_time_of(job_id: str) -> float | None:
    """When a job will reach its time limit, Unix seconds; None if Slurm does not answer at once."""
    with suppress(SlurmError):
        return show_job(job_id, timeout_s=2.0).end_time
    return None


@dataclass(frozen=True)
class Notice:
    """The time that a job is given between a signal and the kill."""

    preemption_s: float | None
    """Seconds, when its nodes are taken for another job; None: that does not happen here, or is not known."""
    source: str
    """Where that comes from: `GraceTime of partition low`."""
    kill_wait_s: float | None
    """Seconds, at the time limit and when it is cancelled; None: not known."""


def notice_of(job_id: str, grace_s: float | None = None, timeout_s: float = 5.0) -> Notice:
    """Ask Slurm how long this job will have.

    Args:
        grace_s: the grace period that the user has configured; it overrides what Slurm says.

    Raises:
        SlurmError: no answer.
    """
    site = _site(timeout_s)
    kill_wait_s = seconds_of(site.get("KillWait", ""))
    if grace_s is not None:
        return Notice(grace_s, "preemption.grace_s", kill_wait_s)
    given, source = _grace_time(job_id, site, timeout_s)
    if given == 0:
        return Notice(kill_wait_s, f"{source} is 0, which leaves KillWait", kill_wait_s)
    return Notice(given, source, kill_wait_s)


def _site(timeout_s: float) -> dict[str, str]:
    lines = run_slurm("scontrol", "show", "config", timeout_s=timeout_s).splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def _grace_time(job_id: str, site: dict[str, str], timeout_s: float) -> tuple[float | None, str]:
    """Slurm's `GraceTime` for a job, in seconds, and where that comes from; None: it is not preempted here."""
    rule = site.get("PreemptType", "preempt/none")
    job = pairs(run_slurm("scontrol", "show", "job", job_id, "-o", timeout_s=timeout_s))
    source = f"GraceTime of partition {job.get('Partition')}"
    if rule == "preempt/partition_prio":
        partition = pairs(
            run_slurm("scontrol", "show", "partition", job.get("Partition", ""), "-o", timeout_s=timeout_s)
        )
        given = None if partition.get("PreemptMode") == "OFF" else seconds_of(partition.get("GraceTime", ""))
    elif rule == "preempt/qos":
        source = f"GraceTime of QOS {job.get('QOS')}"
        qos = ("sacctmgr", "-nP", "show", "qos", f"name={job.get('QOS')}", "format=GraceTime")
        given = seconds_of(run_slurm(*qos, timeout_s=timeout_s).strip())
    else:
        return None, "jobs are not preempted here"
    return given, source


def restart_cause(job: SlurmJob, since: float, now: JobView | None = None, *, signalled: bool = True) -> Cause:
    """Find out why a job is in the queue again, though its run has not requeued it.

    `sacct` knows it. Without it: a preemption leaves its time behind, unless it comes without a grace period; a node
    that has failed is not well, or gave no signal to what ran on it. What is left was `scontrol requeue`.

    Args:
        since: when that start of the job began, Unix seconds.
        now: what Slurm says of the job.
        signalled: whether its ranks were told to stop.
    """
    cause = STATE_CAUSES.get(accounted_state(job) or "")
    if cause in ("preempted", "node_failure"):
        return cause
    if now is not None and now.preempt_time is not None and now.preempt_time >= since:
        return "preempted"
    if now is not None and now.is_held:
        return "requeued"
    if not _nodes_are_well(job.nodelist):
        return "node_failure"
    if cause == "requeued":
        return cause
    with suppress(SlurmError):
        if _grace_time(job.job_id, _site(5.0), 5.0)[0] == 0:
            return "preempted"
    return "requeued" if signalled else "node_failure"


def _nodes_are_well(nodelist: str) -> bool:
    try:
        nodes = run_slurm("sinfo", "--noheader", "--Node", f"--nodes={nodelist}", "--format=%t", timeout_s=5.0)
    except SlurmError:
        return False
    well = {"alloc", "mix", "idle", "comp", "resv", "plnd", "drng", "drain", "maint"}
    return {state.strip("*~#!%$@^-") for state in nodes.split()} <= well


def accounted_state(job: SlurmJob) -> str | None:
    """How this start of a job ended, according to `sacct`; None where no accounts are kept."""
    with suppress(SlurmError):
        out = run_slurm("sacct", "-nXDP", f"--jobs={job.job_id}", "--format=State", timeout_s=5.0)
        lines = out.splitlines()  # one for each start
        if job.restart_count < len(lines):
            return lines[job.restart_count].partition(" ")[0]  # "CANCELLED by 0"
    return None


def ran_out_of_memory(job_id: str) -> bool:
    """Whether `sacct` says that a step of the job's current start was killed for using too much memory."""
    with suppress(SlurmError):
        return "OUT_OF_MEMORY" in run_slurm("sacct", "-nP", f"--jobs={job_id}", "--format=State", timeout_s=5.0)
    return False
