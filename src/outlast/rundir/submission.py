"""Records submissions so that no job is lost or submitted twice, whichever process is killed when.

A token is written down before `sbatch` gets it as the job's comment, and the job's id after. Whoever finds a token
without an id asks Slurm for a job with that comment before submitting anything. A file lock is held meanwhile; `sbatch`
inherits it, so that an `sbatch` whose launcher was killed still keeps others out until Slurm has answered.
"""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lease import wait_for_lease
from .lock import refuse_moved

LOCK = ".submit.lock"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job, or a job array, that was handed to Slurm; `submitted.json` holds one."""

    token: str
    job_id: str | None = None
    """None: not known, because `sbatch` had not answered."""
    cluster: str
    slurm_conf: str | None
    """The configuration of the cluster's Slurm (`SLURM_CONF`); None: the machine's own."""
    time: float = field(default_factory=time.time)
    log: str
    """The batch script's log; an array's has `%A` and `%a` for its id and the task."""
    indices: list[int] | None = None
    """The cells of the sweep that are in an array, by index."""
    offset: int = 0
    """A cell's task in the array is its index less this, since tasks are bounded by Slurm's `MaxArraySize`."""
    place: dict[str, Any] | None = None
    """Whose it is (`place.py`): a copy of the run's directory has not been submitted."""

    @property
    def comment(self) -> str:
        return comment_of(self.token)


def comment_of(token: str) -> str:
    """The `--comment` by which a job is found again."""
    return f"outlast:{token}"


def new_token() -> str:
    """Make a token by which a submission is found again: 16 hexadecimal digits."""
    return secrets.token_hex(8)


@contextmanager
def submission_lock(directory: Path) -> Iterator[int]:
    """Hold a lock while looking into the queue and submitting, so that two commands submit one job.

    Yields:
        The lock's file descriptor, for `submit_recorded`.

    Raises:
        RunBusyError: another command holds it, on a file system without locks, and does not come to an end; or the
            directory was moved or deleted while this one waited.
    """
    fd, lease = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            lease = wait_for_lease(directory / f"{LOCK}.lease")
        refuse_moved(fd, directory / LOCK)
        yield fd
    finally:
        if lease is not None:
            lease.release()
        os.close(fd)
