"""The run directory: the paths in it, and the lock that keeps two attempts apart."""

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from outlast.errors import ConfigError, RunBusyError
from outlast.files import read_json

LOCK_FD_ENV = "OUTLAST_LOCK_FD"
"""Tells a rank the file descriptor of the run lock that its launcher holds."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; it holds no state, since what is on disk is the truth."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def progress(self) -> Path:
        """Where the run is now: one small JSON object, replaced as a whole (see `progress.py`)."""
        return self.path / "progress.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def staging(self) -> Path:
        """Where a checkpoint is written before it is published; swept at start."""
        return self.checkpoints / ".staging"

    @property
    def trash(self) -> Path:
        """Where a checkpoint is moved before what is in it is deleted; swept at start."""
        return self.checkpoints / ".deleted"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def prepared(self) -> Path:
        """What is prepared once for all attempts: the tiny model, the tokenized data."""
        return self.path / "prepared"

    @property
    def reserve(self) -> Path:
        """Bytes set aside for an emergency save (`storage.reserve`)."""
        return self.path / ".reserve"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs / f"attempt-{attempt:03d}.rank-{rank}.log"

    def agent_log(self, attempt: int) -> Path:
        """The log of the agent that starts the ranks on this machine, and of what they print before they begin."""
        return self.logs / f"attempt-{attempt:03d}.agent.log"

    def create(self) -> None:
        """Make the directory and those of its parts that every attempt needs.

        Raises:
            ConfigError: a part in which things are deleted is a symbolic link.
        """
        for path in (self.checkpoints, self.staging, self.trash, self.quarantine, self.prepared):
            if path.is_symlink():
                valid = "valid: a real directory, since nothing outside the run directory is ever deleted. "
                raise ConfigError("run", str(path), valid + "Make the run directory itself the link, or set run.root.")
        for path in (self.checkpoints, self.logs):
            path.mkdir(parents=True, exist_ok=True)


class RunLock:
    """An exclusive `flock` on the run directory, released by the kernel when the last holder of it is gone.

    The file descriptor is inheritable: a launcher that passes it to its ranks keeps the run locked until every one
    of them has left, also when the launcher itself was killed.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.lock
        self.fd: int | None = None

    def acquire(self, owner: str, wait_s: float = 0.0) -> None:
        """Take the lock.

        Args:
            owner: who takes it, in words; shown to whoever is refused.
            wait_s: how long to wait for a holder that is going away.

        Raises:
            RunBusyError: somebody else holds it. A holder whose launcher is dead is waited for, up to a minute:
                its ranks are writing their last checkpoint.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + max(wait_s, 0.5)  # `outlast status` takes a shared lock for an instant
        orphan_deadline = time.monotonic() + max(wait_s, 60.0)
        while not _try_flock(fd):
            holder = self._holder()
            if time.monotonic() > (orphan_deadline if _is_dead(holder) else deadline):
                os.close(fd)
                raise RunBusyError(
                    f"{self._path.parent} is in use by {holder.get('owner', 'another process')} "
                    f"(pid {holder.get('pid', '?')} on {holder.get('host', '?')}). "
                    "Wait for it to end, or stop it; two attempts never run on one directory."
                )
            time.sleep(0.1)
        os.ftruncate(fd, 0)
        record = {"owner": owner, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        os.pwrite(fd, json.dumps(record).encode(), 0)
        os.set_inheritable(fd, True)
        self.fd = fd

    def release(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _holder(self) -> dict[str, Any]:
        holder = read_json(self._path)
        return holder if isinstance(holder, dict) else {}


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return True  # a file system without locks (some Lustre mounts): then only Slurm keeps attempts apart
        raise
    return True


def _is_dead(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and not psutil.pid_exists(int(holder.get("pid", 0) or 0))


def cancelled_after(run: Path, moment: float) -> bool:
    """Whether a user has cancelled the run in directory `run` since `moment` (Unix seconds)."""
    try:
        return float((read_json(run / "cancelled.json") or {})["time"]) > moment
    except (KeyError, TypeError, ValueError):
        return False
