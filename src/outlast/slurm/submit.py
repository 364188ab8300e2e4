"""Submits a batch script so that a launcher killed meanwhile neither loses the job nor submits it twice."""

import os
import re
import shlex
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
    job_id = sbatch(script, [f"--comment={with_token(script, submission.comment)}", *flags], keep_open=lock_fd)
    submission = replace(submission, job_id=job_id, log=submission.log.replace("%j", job_id))
    record(submission)
    return submission


def with_token(script: Path, token: str) -> str:
    """The job's comment: the user's own, in the script or in the environment, with the token after the last `;`."""
    found = re.search(r"^#SBATCH --comment=(.*)$", script.read_text(), re.MULTILINE)
    own = " ".join(shlex.split(found[1])) if found else os.environ.get("SBATCH_COMMENT", "")
    return f"{own};{token}" if own else token
