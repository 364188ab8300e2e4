"""The one module that knows Slurm: what a job's environment says, what `scontrol` and `squeue` answer.

No `SLURM_*` name and no Slurm command stands anywhere else in the library.
"""

import os
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime

from .errors import SlurmError
from .ledger import Cause
from .preemption import signals_blocked


@dataclass(frozen=True)
class SlurmJob:
    """The job (or array task) that this process belongs to."""

    job_id: str
    """As Slurm's commands take it: `123`, or `123_4` for one task of an array. An array task's bare number would,
    for one of the tasks, name the whole array."""
    restart_count: int
    nodelist: str


def current() -> SlurmJob | None:
    """The Slurm job around this process, or None."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return None
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    job_id = f"{array}_{task}" if array and task else env["SLURM_JOB_ID"]
    return SlurmJob(job_id, int(env.get("SLURM_RESTART_COUNT", "0") or 0), env.get("SLURM_JOB_NODELIST", ""))


def environment_without_job() -> dict[str, str]:
    """This process's environment with no trace of a Slurm job around it: for ranks that a foreground launcher starts
    inside an interactive allocation, which must not requeue it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def export_ranks() -> None:
    """Say to torch and accelerate what `srun` said to this task: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, and so on.

    Does nothing outside an `srun` step, or where a launcher has set them already.

    Raises:
        SlurmError: the first node has no address that resolves.
    """
    env = os.environ
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env or "RANK" in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env["LOCAL_WORLD_SIZE"] = env.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0]
    if env["WORLD_SIZE"] == "1":
        env["MASTER_ADDR"] = "127.0.0.1"
    else:
        env["MASTER_ADDR"] = address_of(hostnames(env["SLURM_JOB_NODELIST"])[0])
    # Unlike from attempt to attempt and from job to job, and below the range of ports that the kernel gives out.
    job, restart = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_RESTART_COUNT", "0") or 0)
    env["MASTER_PORT"] = str(10_000 + (job * 7 + restart) % 10_000)


def hostnames(nodelist: str) -> list[str]:
    """Node names of a compressed list: `n[0-1]` gives `["n0", "n1"]`."""
    return _run("scontrol", "show", "hostnames", nodelist).split()


def address_of(node: str) -> str:
    """An address that resolves: the node's name where it does, else the address by which Slurm itself reaches it."""
    address = node
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        address = _fields(_run("scontrol", "show", "node", node, "-o")).get("NodeAddr", "")
        try:
            socket.getaddrinfo(address, None)
        except OSError:
            raise SlurmError(
                f"node {node}: neither its name nor Slurm's address for it ({address or 'none'}) resolves"
            ) from None
    return address


@dataclass(frozen=True)
class JobView:
    """What Slurm says of a job at one moment. Times are Unix seconds."""

    state: str
    reason: str
    preempt_time: float | None
    start_time: float | None
    end_time: float | None

    @property
    def is_preempted(self) -> bool:
        """Whether Slurm is taking this attempt's nodes away; the time of an earlier attempt's preemption stays."""
        return self.preempt_time is not None and self.preempt_time >= (self.start_time or 0.0)

    @property
    def is_ending(self) -> bool:
        return self.state in ("COMPLETING", "CANCELLED")

    def stop_cause(self, lead_s: float) -> Cause:
        """Why this job was signalled, from what Slurm says while the signal is fresh.

        A preempted job is still RUNNING and has a `PreemptTime`; one that was cancelled is COMPLETING without one; one
        at its time limit says so, or is within `--signal`'s lead (which may come 60 s early) of its end. What is left
        is a signal that somebody sent on purpose, and that means the same as a preemption.

        Args:
            lead_s: the lead time that `--signal` was given, seconds.
        """
        if self.state == "CANCELLED":
            return "cancelled"
        if self.is_preempted:
            return "preempted"
        if self.reason == "TimeLimit" or self.state == "TIMEOUT":
            return "time_limit"
        if self.is_ending:
            return "cancelled"
        if self.end_time is not None and self.end_time - time.time() <= lead_s + 65.0:
            return "time_limit"
        return "preempted"


def show_job(job_id: str, timeout_s: float = 20.0) -> JobView:
    """Ask Slurm about a job.

    Raises:
        SlurmError: no answer within `timeout_s`, or the job is unknown.
    """
    fields = _fields(_run("scontrol", "show", "job", job_id, "-o", timeout_s=timeout_s))
    return JobView(
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", ""),
        preempt_time=_time(fields.get("PreemptTime")),
        start_time=_time(fields.get("StartTime")),
        end_time=_time(fields.get("EndTime")),
    )


def requeue(job_id: str, delay_s: int) -> bool:
    """Requeue a running job from inside it, and bring its next start forward to `delay_s` from now.

    Slurm holds a requeued job back for the lifetime of its credential (two minutes by default). The start time given
    here replaces that hold if it lies a little after the moment at which the job has finished completing; every rank
    must therefore leave at once.

    Returns:
        Whether the hold could be lifted. A site may forbid that; the job is requeued all the same.

    Raises:
        SlurmError: the requeue itself was refused.
    """
    _run("scontrol", "requeue", job_id)
    try:
        _run("scontrol", "update", f"JobId={job_id}", f"StartTime=now+{delay_s}")
    except SlurmError:
        return False
    return True


def queue_states(job_ids: list[str]) -> dict[str, str]:
    """States of jobs that the queue knows (`PENDING`, `RUNNING`, ...), in one call; a job that has left is absent.

    Raises:
        SlurmError: no answer.
    """
    if not job_ids:
        return {}
    out = _run("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", "--me")
    states = dict(line.strip().split("|", 1) for line in out.splitlines() if "|" in line)
    return {job_id: states[job_id] for job_id in job_ids if job_id in states}


def _run(*command: str, timeout_s: float = 20.0) -> str:
    try:
        with signals_blocked():
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{' '.join(command)}` did not answer within {timeout_s:g} s") from None
    if done.returncode != 0:
        raise SlurmError(f"`{' '.join(command)}`: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _fields(line: str) -> dict[str, str]:
    """The `Key=value` pairs of `scontrol -o`. Values with spaces (Command, Comment) lose all but their first word."""
    return dict(pair.split("=", 1) for pair in line.split() if "=" in pair)


def _time(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None  # "Unknown", "None", "N/A"
