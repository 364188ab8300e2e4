"""Submits a batch script so that a launcher killed meanwhile neither loses the job nor submits it twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from outlast.rundir.submission import Submission

from .actions import sbatch


def submit_recorded(
    submission: Submission, script: Path, flags: list[str], lock_fd: int, record: Callable[[Submission], None]
) -> Submission:
    """Submit a batch script, and record the submission before and after.

    Args:
        flags: of `sbatch`, before the script's own.
        record: writes the submission down; called before `sbatch` without the id, and after it with the id.

    Raises:
        SlurmError: `sbatch` refused the job, or did not answer. The next command then looks up what was recorded.
    """
    record(submission)
    job_id = sbatch(script, [f"--comment={submission.comment}", *flags], keep_open=lock_fd)
    submission = replace(submission, job_id=job_id, log=submission.log.replace("%j", job_id))
    record(submission)
    return submission
