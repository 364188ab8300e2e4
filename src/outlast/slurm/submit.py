"""Hands a batch script to Slurm such that a launcher that is killed meanwhile loses and doubles nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from outlast.rundir.submission import Submission

from .actions import sbatch


def submit_recorded(
    submission: Submission, script: Path, flags: list[str], lock_fd: int, record: Callable[[Submission], None]
) -> Submission:
    """Hand a batch script to Slurm.

    Args:
        flags: of `sbatch`, before the script's own.
        record: writes the submission down; called before, without the id, and after, with it.

    Raises:
        SlurmError: `sbatch` refused the job, or did not answer. What has been recorded is then looked up by the next
            command.
    """
    record(submission)
    job_id = sbatch(script, [f"--comment={submission.comment}", *flags], keep_open=lock_fd)
    submission = replace(submission, job_id=job_id, log=submission.log.replace("%j", job_id))
    record(submission)
    return submission
