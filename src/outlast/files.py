"""Bytes on disk: what a run directory takes."""

import errno
import os
from pathlib import Path

_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def bytes_used(path: Path, *, skip_unreadable: bool = False) -> int:
    """Bytes in all regular files under `path`, by their size; 0 if there is no such directory.

    Symbolic links are not followed. Files that vanish during the walk (a rename, a deletion) are left out.

    Args:
        skip_unreadable: leave out directories that can't be read; the sum is then too small.

    Raises:
        OSError: a directory that can't be read.
    """
    total = 0
    pending = [str(path)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        total += _size(entry)
        except OSError as error:
            if error.errno not in _VANISHED and not skip_unreadable:
                raise
    return total


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError as error:
        if error.errno not in _VANISHED:
            raise
        return 0
