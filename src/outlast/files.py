"""Files: written as a whole and durably, read as JSON, and the bytes that a directory takes."""

import errno
import json
import os
from pathlib import Path
from typing import Any

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


def read_json(path: Path) -> Any | None:
    """What a JSON file holds; None where there is none, where it can't be read, and where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` as a whole: a reader sees the old text or the new one, never a part.

    Args:
        durable: flush to disk, so that the new text also survives a power loss.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        flush_directory(path.parent)


def remove_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` have left beside it. Nobody may be writing it meanwhile."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """Have the kernel write all of a file to disk, and wait for it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename or a new name in it survives a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
