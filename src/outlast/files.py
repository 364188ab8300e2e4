"""Writes files and directories as a whole and durably, reads JSON, and counts the bytes that a directory takes."""

import errno
import json
import math
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .deletion import delete

FLUSHERS = 4
"""Threads that flush small files: a file system joins what is flushed at the same time into one commit."""
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


def parse_yaml(text: str) -> Any:
    """Parse YAML, in C where that parser is installed: a sweep has a thousand such files.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_json(path: Path) -> Any | None:
    """The contents of a JSON file; None if it is missing, unreadable or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Write plain values as JSON that any parser reads: NaN and infinity, which JSON lacks, as null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str, *, durable: bool = True, private: bool = False) -> None:
    """Replace `path` as a whole: a reader sees the old text or the new one, never a part.

    Args:
        durable: flush to disk, so that the new text also survives a power loss.
        private: whatever the umask, only the owner may read it, and the group if the umask lets it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", opener=_open_private if private else None) as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        flush_directory(path.parent)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o660)


def remove_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` have left beside it. Nobody may be writing it meanwhile."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        delete(temporary, inside=path.parent)


@contextmanager
def staged_directory(target: Path, *, durable: bool = True, replace: bool = True) -> Iterator[Path]:
    """Yield a fresh directory that replaces `target` as a whole if the block succeeds, and is removed if it fails.

    For one process at a time. What a killed process has left beside `target` is removed first.

    Args:
        durable: flush its files to disk, so that `target` is whole or absent also after a power loss.
        replace: if not, only an empty directory is replaced; anything else stays, and is an `OSError`.
    """
    staging, old = target.with_name(f".{target.name}.staging"), target.with_name(f".{target.name}.old")
    leftovers = (staging, old) if replace else (staging,)
    _sweep(*leftovers)
    staging.mkdir(parents=True)
    try:
        yield staging
        if durable:
            flush_tree(staging)
        if replace and os.path.lexists(target):
            os.rename(target, old)
        os.rename(staging, target)
        flush_directory(target.parent)
    finally:
        _sweep(*leftovers)


def _sweep(*leftovers: Path) -> None:
    for leftover in leftovers:
        with suppress(OSError):
            delete(leftover, inside=leftover.parent)


def flush_file(path: Path) -> None:
    """Flush a file's contents to disk."""
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


def make_durably(path: Path) -> None:
    """Make a directory and those above it that are missing, and flush the entries of all that were made."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        flush_directory(made.parent)


def flush_tree(directory: Path, skip: Collection[str] = ()) -> None:
    """Flush all files of `directory`, and the directory itself, to disk; `skip` holds relative paths to leave out."""
    paths = sorted(directory.rglob("*"))
    files = [p for p in paths if p.is_file() and p.relative_to(directory).as_posix() not in skip]
    with ThreadPoolExecutor(FLUSHERS) as flushers:
        list(flushers.map(flush_file, files))
    for path in (directory, *(p for p in paths if p.is_dir())):
        flush_directory(path)
