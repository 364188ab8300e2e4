"""A lock for file systems without working locks: a file that its holder keeps touching.

Some Lustre mounts have no `flock` at all; on others, and on NFS mounted with `nolock`, it keeps only the processes of
one node apart. What every file system can do is to create a file that must not exist. The holder touches it every few
seconds; who wants it watches, by its own clock, whether that goes on. A holder that was stopped for long, and whose
lease somebody else has taken, ends at its next touch.
"""

import atexit
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from outlast import clock
from outlast.deletion import delete
from outlast.errors import RunBusyError
from outlast.files import read_json
from outlast.processes import exit_at_once

LEASE_ENV = "OUTLAST_LEASE"
"""Tells a rank the token of the lease that its launcher holds: it keeps it as well."""
BEAT_S = 3.0
"""Seconds between two touches."""
STALE_S = 60.0
"""Seconds without a touch after which the holder is taken for dead: longer than a network file system may hang."""
NODE_LOCAL = ("localflock", "nolock", "local_lock=all", "local_lock=flock")
"""Mount options of Lustre and NFS with which `flock` does not reach other nodes."""


def locks_reach_other_nodes(path: Path) -> bool:
    """Whether nothing in the mount options says that locks on `path` hold on this node alone."""
    real = os.path.realpath(path)
    mounts = [part for part in psutil.disk_partitions(all=True) if Path(real).is_relative_to(part.mountpoint)]
    options = max(mounts, key=lambda part: len(part.mountpoint)).opts.split(",") if mounts else []
    return not set(NODE_LOCAL) & set(options)


class Lease:
    """A claim on `path`, held by this process or by one that has started it.

    Args:
        lost: called, in a thread, when another process has taken the lease; must end this one.
    """

    def __init__(self, path: Path, token: str | None = None, lost: Callable[[], None] | None = None) -> None:
        self._path, self._lost = path, lost or self._leave
        self.token = token or secrets.token_hex(8)
        self._over = threading.Event()
        self._seen: tuple[object, float] | None = None
        self.seen_alive = False
        """Whether another holder has touched it while this process was watching."""

    def take(self) -> bool:
        """Try once: create the file, or see whether its holder is alive. To be called again and again."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            self._watch()
            return False
        with os.fdopen(fd, "w") as file:
            json.dump({"token": self.token}, file)
        self.keep()
        return True

    def keep(self) -> None:
        """Touch the file from here on, in a thread, until :meth:`release` or the end of this process."""
        threading.Thread(target=self._beat, name="outlast-lease", daemon=True).start()

    def release_at_exit(self) -> None:
        """Give it back when this process ends in good order, so that the next one need not find it stale."""
        atexit.register(self.release)

    def release(self) -> None:
        """Give it back."""
        self._over.set()
        if self._holder() == self.token:
            delete(self._path, inside=self._path.parent)

    def _watch(self) -> None:
        """Put the file aside if nobody has touched it for long."""
        try:
            status = self._path.stat()
        except OSError:
            return  # given back just now
        found, now = (status.st_ino, status.st_mtime_ns, self._holder()), clock.now()
        if self._seen is None or self._seen[0] != found:
            self.seen_alive |= self._seen is not None
            self._seen = found, now
        elif now - self._seen[1] >= STALE_S:
            aside = self._path.with_name(f"{self._path.name}.{self.token}")
            with suppress(OSError):  # another one was first
                os.rename(self._path, aside)
                delete(aside, inside=aside.parent)
            self._seen = None

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                holder = json.loads(self._path.read_bytes())["token"]
                if holder == self.token:
                    os.utime(self._path)
                elif not self._over.is_set():
                    self._lost()
                    return
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it can't be read just now, or is being written

    def _holder(self) -> str | None:
        values = read_json(self._path)
        return values.get("token") if isinstance(values, dict) else None

    def _leave(self) -> None:
        print(f"[outlast] another process has taken {self._path}, as this one was silent for long: leaving", flush=True)
        exit_at_once(1)


def is_kept(path: Path) -> bool:
    """Whether somebody has touched the lease lately, by this node's clock."""
    try:
        return time.time() - path.stat().st_mtime < STALE_S
    except OSError:
        return False


def wait_for_lease(path: Path) -> Lease:
    """Take a lease that others hold for a moment.

    Raises:
        RunBusyError: somebody holds it for longer than it takes to find one dead.
    """
    lease, deadline = Lease(path), time.monotonic() + 2 * STALE_S
    while not lease.take():
        if time.monotonic() > deadline:
            raise RunBusyError(f"{path} is held by another process. Wait for it to end, or stop it")
        time.sleep(0.1)
    return lease
