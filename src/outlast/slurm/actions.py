"""Asks Slurm to submit a job, and to requeue it."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outlast.errors import SlurmError

from .commands import run_slurm
from .environment import SlurmJob, environment_without_job
from .view import show_job


@dataclass(frozen=True)
class Requeued:
    """A job that is in the queue again."""

    by: Literal["job", "slurm"]
    """Who put it there: the job itself, or Slurm, which had done so already."""
    hold_lifted: bool
    """False also for a job that somebody has put there to stay (`scontrol requeuehold`)."""


def requeue_job(job: SlurmJob, delay_s: int) -> Requeued:
    """Requeue a running job from inside it, and bring its next start forward to `delay_s` from now.

    Slurm holds a requeued job back for the lifetime of its credential (two minutes by default). The start time given
    here replaces that hold if it lies a little after the moment at which the job has finished completing; every rank
    must therefore leave at once. Where a site forbids setting it, the job is requeued all the same. Slurm
    refuses a second requeue, which counts as done.

    Raises:
        SlurmError: the requeue itself was refused.
    """
    by: Literal["job", "slurm"] = "job"
    try:
        run_slurm("scontrol", "requeue", job.job_id)
    except SlurmError:
        now = show_job(job.job_id)
        if now.restarts <= job.restart_count:
            raise
        if now.is_held:
            return Requeued("slurm", False)
        by = "slurm"
    try:
        bring_forward(job, delay_s)
    except SlurmError:
        return Requeued(by, False)
    return Requeued(by, True)


def bring_forward(job: SlurmJob, delay_s: int) -> None:
    """Have a job that has been requeued start `delay_s` from now.

    Raises:
        SlurmError: it was refused.
    """
    # As Unix seconds: the command reads `now+5` as local time, which is an hour off while an hour comes twice.
    run_slurm("scontrol", "update", f"JobId={job.job_id}", f"StartTime=uts{int(time.time()) + delay_s}")


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
    out = run_slurm(*command, timeout_s=120.0, pass_fds=fds, env=env)
    job_id = out.strip().splitlines()[-1].partition(";")[0] if out.strip() else ""  # "7;cluster"
    if not job_id.isdigit():
        raise SlurmError(f"`sbatch {script}` answered {out.strip()!r}, which is no job id")
    return job_id


def _overruled(script: Path) -> set[str]:
    """Environment variables of `sbatch` that would silently override the script's own flags."""
    flags = set(re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(), re.MULTILINE))
    names = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX", "gpus-per-node": "GPUS_PER_NODE"}
    found = {f"SBATCH_{names.get(flag, flag.upper().replace('-', '_'))}" for flag in flags}
    return found | ({"SBATCH_NO_REQUEUE"} if "requeue" in flags else set())


def max_array_size() -> int:
    """The bound on the numbers of array tasks (Slurm's `MaxArraySize`); 1 where arrays are switched off.

    Raises:
        SlurmError: no answer.
    """
    for line in run_slurm("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize":
            return max(int(value), 1)
    return 1001  # Slurm's default
