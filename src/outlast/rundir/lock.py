"""The lock that keeps two attempts on one run directory apart."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from outlast.errors import RunBusyError
from outlast.files import read_json

from .directory import RunDirectory
from .lease import LEASE_ENV, Lease, locks_reach_other_nodes

LOCK_FD_ENV = "OUTLAST_LOCK_FD"
"""Tells a rank the file descriptor of the run lock that its launcher holds."""


_private: set[int] = set()
"""Descriptors of locks that a forked child lets go of at once: a helper of the user's may outlive the run."""


class RunLock:
    """An exclusive lock on the run directory: a `flock`, which the kernel releases with its last holder.

    The file descriptor is inheritable: a launcher that passes it to its ranks keeps the run locked until every one
    of them has left, also when the launcher itself was killed. Where there is no such lock, or none that reaches other
    nodes, a lease stands in for it or beside it.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path, self._lease_path = run.lock, run.lease
        self.fd: int | None = None
        self._lease: Lease | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What tells a rank that its launcher holds the lock."""
        lease = {} if self._lease is None else {LEASE_ENV: self._lease.token}
        return {LOCK_FD_ENV: str(self.fd), **lease}

    def share(self) -> None:
        """Keep what the launcher of this process holds, until this process is gone."""
        if LEASE_ENV in os.environ:
            self._lease = Lease(self._lease_path, os.environ[LEASE_ENV])
            self._lease.keep()

    def keep_from_children(self) -> None:
        """Have the lock end with this process, not with the last of those that it starts: it is a rank."""
        fd = int(os.environ.get(LOCK_FD_ENV, -1)) if self.fd is None else self.fd
        if fd >= 0:
            os.set_inheritable(fd, False)
            _private.add(fd)

    def acquire(self, owner: str, wait_s: float = 0.0) -> None:
        """Take the lock.

        Args:
            owner: who takes it, in words; shown to whoever is refused.
            wait_s: how long to wait for a holder that is going away.

        Raises:
            RunBusyError: somebody else holds it. A holder whose launcher is dead is waited for, up to a minute:
                its ranks are writing their last checkpoint. Or the directory was moved or deleted meanwhile.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + max(wait_s, 0.5)  # `outlast status` takes a shared lock for an instant
        orphan_deadline = time.monotonic() + max(wait_s, 60.0)
        lease, enough = None, locks_reach_other_nodes(self._path)
        while True:
            locked = _try_flock(fd)
            if locked is not False:
                try:
                    refuse_moved(fd, self._path)
                except RunBusyError:
                    os.close(fd)
                    raise
            if locked and enough:
                break
            if locked is not False:
                lease = lease or Lease(self._lease_path)
                if lease.take():
                    break
            holder, unknown = self._holder(), lease is not None and not lease.seen_alive
            if not unknown and time.monotonic() > (orphan_deadline if _is_dead(holder) else deadline):
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
        self.fd, self._lease = fd, lease
        if lease is not None:
            lease.release_at_exit()

    def release(self) -> None:
        if self.fd is not None:
            if self._lease is not None:
                self._lease.release()
            os.close(self.fd)
            _private.discard(self.fd)
            self.fd = self._lease = None

    def _holder(self) -> dict[str, Any]:
        holder = read_json(self._path)
        return holder if isinstance(holder, dict) else {}


def refuse_moved(fd: int, path: Path) -> None:
    """Refuse a lock file that is no longer at its path: whoever has waited for it has locked nothing.

    Raises:
        RunBusyError: the directory was moved or deleted since the file was opened.
    """
    try:
        there = os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        there = False
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        there = False
    if not there:
        raise RunBusyError(
            f"{path.parent} was moved or deleted meanwhile, and nothing was begun in its place. "
            "Where it is now, `outlast resume` goes on; to begin anew here, give the same command again."
        )


def _let_go_in_child() -> None:
    for fd in _private:
        os.close(fd)
    _private.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def _try_flock(fd: int) -> bool | None:
    """Whether the lock is had; None on a file system without locks (some Lustre mounts)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    return True


def _is_dead(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and not psutil.pid_exists(int(holder.get("pid", 0) or 0))
