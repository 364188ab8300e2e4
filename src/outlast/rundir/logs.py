"""Keeps the logs of a run within bounds: old attempts' go first, then the older part of the newest."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from outlast.deletion import delete

from .directory import RunDirectory

ATTEMPT = re.compile(r"attempt-(\d+)\.")
CUT = b"[outlast] what was here before is cut: the logs had reached their limit\n"


def bound(run: RunDirectory, limit: int, attempt: int) -> int:
    """Cut the logs of a run to half of `limit` bytes if they take more.

    The log of a living process is cut in place: who writes it, children included, appends (`O_APPEND`), and goes on at
    its new end. A line that is written in that very moment may be lost.

    Args:
        attempt: the number of the attempt that runs now.

    Returns:
        The bytes that were cut.
    """
    sizes = dict(_sizes(run.logs))
    total = before = sum(sizes.values())
    if total <= limit:
        return 0
    for path in sorted(sizes):
        number = ATTEMPT.match(path.name)
        if total > limit // 2 and number is not None and int(number[1]) < attempt:
            with suppress(OSError):
                delete(path, inside=run.path)
                total -= sizes.pop(path)
    for path in sorted(sizes, key=lambda path: -sizes[path]):
        if total > limit // 2:
            with suppress(OSError):
                total -= sizes[path] - _keep_end(path, limit // 2 // len(sizes))
    return before - total


def _sizes(logs: Path) -> Iterator[tuple[Path, int]]:
    with suppress(OSError), os.scandir(logs) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False).st_size


def _keep_end(path: Path, size: int) -> int:
    """Cut a file to its last whole lines, of up to `size` bytes; return what it has then."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        there = os.fstat(fd).st_size
        if there <= size:
            return there
        end = os.pread(fd, size, there - size)
        os.ftruncate(fd, 0)
        os.write(fd, CUT + end[end.find(b"\n") + 1 :])
        return os.fstat(fd).st_size
    finally:
        os.close(fd)
