"""What Slurm says about a job: its state, why it was signalled, how long it has, how it ended."""

import time
from contextlib import suppress
from dataclasses import dataclass

from outlast.errors import SlurmError
from outlast.rundir.ledger import Cause

from .commands import pairs, run_slurm, seconds_of, slurm_timestamp
from .environment import SlurmJob

STATE_CAUSES: dict[str, Cause] = {
    "PREEMPTED": "preempted",
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

    @property
    def is_preempted(self) -> bool:
        """Whether Slurm is taking this attempt's nodes away; the time of an earlier attempt's preemption stays."""
        return self.preempt_time is not None and self.preempt_time >= (self.start_time or 0.0)

    @property
    def is_ending(self) -> bool:
        return self.state == "COMPLETING" or self.state in STATE_CAUSES

    def stop_cause(self, job: SlurmJob, lead_s: float) -> Cause | None:
        """Why this job was signalled, from what Slurm says while the signal is fresh.

        A preempted job is still RUNNING and has a `PreemptTime`, or, without a grace period, is COMPLETING with one;
        a cancelled one is COMPLETING without. A job that Slurm itself has requeued lost a node, or had no
        grace period. At its time limit it says so, or is within `--signal`'s lead (which may come 60 s early) of it.

        Args:
            lead_s: the lead time that `--signal` was given, seconds.

        Returns:
            None: the job goes on, as far as Slurm is concerned. Then somebody sent the signal on purpose, or `srun`
            did, which ends the other ranks when one has died.
        """
        if self.restarts > job.restart_count:
            return restart_cause(job)
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
    lines = run_slurm("scontrol", "show", "config", timeout_s=timeout_s).splitlines()
    site = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    kill_wait_s = seconds_of(site.get("KillWait", ""))
    if grace_s is not None:
        return Notice(grace_s, "preemption.grace_s", kill_wait_s)
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
        return Notice(None, "jobs are not preempted here", kill_wait_s)
    if given == 0:
        return Notice(kill_wait_s, f"{source} is 0, which leaves KillWait", kill_wait_s)
    return Notice(given, source, kill_wait_s)


def restart_cause(job: SlurmJob) -> Cause:
    """Find out why Slurm itself requeued this attempt's job: from `sacct`, else from the state of its nodes.

    If `sacct` does not say and the nodes are well, they were taken for another job, without a grace period.
    """
    cause = STATE_CAUSES.get(accounted_state(job) or "")
    if cause in ("preempted", "node_failure"):
        return cause
    with suppress(SlurmError):
        nodes = run_slurm("sinfo", "--noheader", "--Node", f"--nodes={job.nodelist}", "--format=%t", timeout_s=5.0)
        well = {"alloc", "mix", "idle", "comp", "resv", "plnd", "drng"}
        return "preempted" if {state.strip("*~#!%$@^-") for state in nodes.split()} <= well else "node_failure"
    return "node_failure"


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
