"""Submitting a job such that it is neither lost nor doubled, whoever is killed when.

A token is written down before `sbatch` gets it as the job's comment, the job's id after. Who finds a token without an
id asks Slurm for that comment before submitting anything. A file lock is held meanwhile; `sbatch` inherits it, so that
one whose launcher was killed still keeps others out until Slurm has answered it.
"""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

LOCK = ".submit.lock"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job, or a job array, that was handed to Slurm; `submitted.json` holds one."""

    token: str
    job_id: str | None = None
    """None: not known, `sbatch` was on its way."""
    cluster: str
    slurm_conf: str | None
    """Which cluster's Slurm (`SLURM_CONF`); None: the machine's own."""
    time: float = field(default_factory=time.time)
    log: str
    """Where the batch script writes; of an array, with `%A` and `%a` for its id and the task."""
    indices: list[int] | None = None
    """Of an array: the cells of the sweep that are in it."""
    offset: int = 0
    """What is to be taken from a cell's index to get its task in the array (beyond Slurm's `MaxArraySize`)."""

    @property
    def comment(self) -> str:
        return comment_of(self.token)


def comment_of(token: str) -> str:
    """The `--comment` by which a job is found again."""
    return f"outlast:{token}"


def new_token() -> str:
    """What a submission is found again by; 16 hexadecimal digits."""
    return secrets.token_hex(8)


@contextmanager
def submission_lock(directory: Path) -> Iterator[int]:
    """Held over "is it in the queue?" and `sbatch`, so that two commands at once submit one job. Waits for its turn.

    Yields:
        The lock's file descriptor, for `submit`.
    """
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with suppress(OSError):  # a file system without locks: the token alone has to do
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)
