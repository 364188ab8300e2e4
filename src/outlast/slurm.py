"""The one module that knows Slurm: what a job's environment says, what `scontrol` and `squeue` answer.

No `SLURM_*` name and no Slurm command stands anywhere else in the library.
"""

import os
import re
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

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
    return run("scontrol", "show", "hostnames", nodelist).split()


def address_of(node: str) -> str:
    """An address that resolves: the node's name where it does, else the address by which Slurm itself reaches it."""
    address = node
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        address = _fields(run("scontrol", "show", "node", node, "-o")).get("NodeAddr", "")
        try:
            socket.getaddrinfo(address, None)
        except OSError:
            raise SlurmError(
                f"node {node}: neither its name nor Slurm's address for it ({address or 'none'}) resolves"
            ) from None
    return address


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
    """What Slurm says of a job at one moment. Times are Unix seconds."""

    state: str
    reason: str
    preempt_time: float | None
    start_time: float | None
    end_time: float | None
    restarts: int = 0
    """How often Slurm has put the job back into the queue; it counts at that moment, not at the next start."""

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
        a cancelled one is COMPLETING without. One that Slurm has put back into the queue itself lost a node, or had no
        grace period. At its time limit it says so, or is within `--signal`'s lead (which may come 60 s early) of it.

        Args:
            lead_s: the lead time that `--signal` was given, seconds.

        Returns:
            None: the job goes on, as far as Slurm is concerned. A signal that somebody sent on purpose, or one from
            `srun`, which ends the other ranks when one has died.
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
    fields = _fields(run("scontrol", "show", "job", job_id, "-o", timeout_s=timeout_s))
    return JobView(
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", ""),
        preempt_time=timestamp(fields.get("PreemptTime")),
        start_time=timestamp(fields.get("StartTime")),
        end_time=timestamp(fields.get("EndTime")),
        restarts=int(fields.get("Restarts", "0") or 0),
    )


def restart_cause(job: SlurmJob) -> Cause:
    """Why Slurm itself has put this attempt's job back into the queue: by `sacct`, else by the state of its nodes.

    Where nobody says otherwise and its nodes are well, they were taken for another job, without a grace period.
    """
    cause = STATE_CAUSES.get(accounted_state(job) or "")
    if cause in ("preempted", "node_failure"):
        return cause
    with suppress(SlurmError):
        nodes = run("sinfo", "--noheader", "--Node", f"--nodes={job.nodelist}", "--format=%t", timeout_s=5.0)
        well = {"alloc", "mix", "idle", "comp", "resv", "plnd", "drng"}
        return "preempted" if {state.strip("*~#!%$@^-") for state in nodes.split()} <= well else "node_failure"
    return "node_failure"


def accounted_state(job: SlurmJob) -> str | None:
    """How `sacct` says that one start of a job ended (each has a line of its own), or None where nobody keeps that."""
    with suppress(SlurmError):
        out = run("sacct", "-nXDP", f"--jobs={job.job_id}", "--format=State", timeout_s=5.0)
        lines = out.splitlines()
        if job.restart_count < len(lines):
            return lines[job.restart_count].partition(" ")[0]  # "CANCELLED by 0"
    return None


def ran_out_of_memory(job_id: str) -> bool:
    """Whether `sacct` says that a step of the job's present start was killed for using too much memory."""
    with suppress(SlurmError):
        return "OUT_OF_MEMORY" in run("sacct", "-nP", f"--jobs={job_id}", "--format=State", timeout_s=5.0)
    return False


@dataclass(frozen=True)
class Requeued:
    """A job that is in the queue again."""

    by: Literal["job", "slurm"]
    """Who put it there: Slurm had done so already, or it was done from inside the job."""
    hold_lifted: bool


def requeue(job: SlurmJob, delay_s: int) -> Requeued:
    """Requeue a running job from inside it, and bring its next start forward to `delay_s` from now.

    Slurm holds a requeued job back for the lifetime of its credential (two minutes by default). The start time given
    here replaces that hold if it lies a little after the moment at which the job has finished completing; every rank
    must therefore leave at once. Where a site forbids to set it, the job is requeued all the same. A second requeue
    is refused by Slurm, and counts as done.

    Raises:
        SlurmError: the requeue itself was refused.
    """
    by: Literal["job", "slurm"] = "job"
    try:
        run("scontrol", "requeue", job.job_id)
    except SlurmError:
        if show_job(job.job_id).restarts <= job.restart_count:
            raise
        by = "slurm"
    try:
        run("scontrol", "update", f"JobId={job.job_id}", f"StartTime=now+{delay_s}")
    except SlurmError:
        return Requeued(by, False)
    return Requeued(by, True)


def sbatch(script: Path, flags: list[str], keep_open: int | None = None) -> str:
    """Submit a batch script.

    Args:
        keep_open: a file descriptor that `sbatch` inherits: a lock that must not be free before Slurm has answered.

    Returns:
        The job's id, or the array's.

    Raises:
        SlurmError: Slurm refused the job, or did not answer.
    """
    fds = () if keep_open is None else (keep_open,)
    command = ("sbatch", "--parsable", *flags, str(script))
    env = {name: value for name, value in environment_without_job().items() if name not in _overruled(script)}
    out = run(*command, timeout_s=120.0, pass_fds=fds, env=env)
    job_id = out.strip().splitlines()[-1].partition(";")[0] if out.strip() else ""  # "7;cluster"
    if not job_id.isdigit():
        raise SlurmError(f"`sbatch {script}` answered {out.strip()!r}, which is no job id")
    return job_id


def _overruled(script: Path) -> set[str]:
    """Environment variables of `sbatch` that would silently win against what the script says of itself."""
    flags = set(re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(), re.MULTILINE))
    names = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX", "gpus-per-node": "GPUS_PER_NODE"}
    found = {f"SBATCH_{names.get(flag, flag.upper().replace('-', '_'))}" for flag in flags}
    return found | ({"SBATCH_NO_REQUEUE"} if "requeue" in flags else set())


def max_array_size() -> int:
    """Tasks of an array are numbered below this (Slurm's `MaxArraySize`); 1 where arrays are switched off.

    Raises:
        SlurmError: no answer.
    """
    for line in run("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize":
            return max(int(value), 1)
    return 1001  # Slurm's default


def run(
    *command: str, timeout_s: float = 20.0, pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> str:
    """The output of one of Slurm's commands. A user's own formats and filters are taken out of its environment.

    Args:
        env: its environment; None: this process's.

    Raises:
        SlurmError: it is not installed, failed, or did not answer within `timeout_s`; one line that says which.
    """
    env = {name: value for name, value in (env or os.environ).items() if not name.startswith("SQUEUE_")}
    env["SLURM_TIME_FORMAT"] = "standard"
    env["SLURM_BITSTR_LEN"] = "0"  # the tasks of an array in full: by default the list ends after 64 characters
    try:
        with signals_blocked():
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False, pass_fds=pass_fds, env=env
            )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {timeout_s:g} s") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        told = re.sub(rf"^{command[0]}: ((error|fatal): )?", "", lines[-1]) if lines else f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]}: {told}")
    return done.stdout


def _fields(line: str) -> dict[str, str]:
    """The `Key=value` pairs of `scontrol -o`. Values with spaces (Command, Comment) lose all but their first word."""
    return dict(pair.split("=", 1) for pair in line.split() if "=" in pair)


def timestamp(text: str | None) -> float | None:
    """A time as Slurm prints it, in Unix seconds; None where it prints none."""
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None  # "Unknown", "None", "N/A"
