"""A directory moved to another file system such that a kill at any instant leaves it whole in one place or the other.

It is copied to a staged place beside its destination, read back from the disk and compared, and published by a rename.
Then the source gets another name, by a rename too, and is deleted. A note in the copy says where it comes from, until
all is done: by it a second call tells how far the first one came, and goes on.
"""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpoint.manifest import MANIFEST, READ_BYTES, FileEntry, entry_of, read_entry, verify
from outlast.deletion import delete
from outlast.errors import CheckpointError, OutlastError
from outlast.files import flush_directory, flush_tree, read_json, write_atomically
from outlast.rundir.directory import MOVED_FROM
from outlast.rundir.place import place_of

from ..runs.find import MOVED, MOVING

NOT_COPIED = (".lease", ".submit.lock.lease", ".ledger.jsonl.lease", MOVED_FROM)
STATELESS = (*NOT_COPIED, ".lock", ".submit.lock")
"""What a second `outlast move` changes in the source, too."""


class CopyError(OutlastError):
    """The copy could not be made, or is not what was read; the source is as it was."""


def staged_at(target: Path, source: Path) -> Path:
    """Where the copy is made, beside its destination: a place of its own for each source, which is what is locked."""
    of = xxhash.xxh3_64_hexdigest(os.fsencode(source.resolve()))[:8]
    return target.with_name(f".{target.name}.{of}{MOVING}")


def leftover_of(source: Path) -> Path:
    """The name that the source has while it is deleted."""
    return source.with_name(f".{source.name}{MOVED}")


def is_copy_of(target: Path, source: Path) -> bool:
    """Whether `target` was published as a copy of `source`, be it there still or not, and `source` did not go on."""
    note = read_json(target / MOVED_FROM)
    if not isinstance(note, dict) or note.get("path") != str(source.resolve()):
        return False
    return not os.path.lexists(source) or _note(source) == note


def _note(source: Path) -> dict[str, Any]:
    """Describe the source in its copy: its place, and a digest by which one that went on is told."""
    return place_of(source) | {"state": _state(source)}


def _state(source: Path) -> str:
    """A digest of the names in it, and of the size and the time of change of each file."""
    digest = xxhash.xxh3_128()
    for top, folders, files in os.walk(source):
        folders.sort()
        for path in sorted(Path(top, name) for name in (*folders, *files)):
            if path.parent == source and path.name in STATELESS:
                continue
            status = path.lstat()
            told = (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else ()
            said = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
            digest.update(repr((str(path.relative_to(source)), stat.S_IFMT(status.st_mode), told, said)).encode())
    return digest.hexdigest()


def copy(source: Path, target: Path, say: Callable[[str], None]) -> None:
    """Copy, verify and publish. What an earlier call has copied is compared, and used if it is the same.

    Raises:
        CopyError: the copy differs from what was read, the source was written to meanwhile, or there is a file of a
            kind that is not copied.
        OSError: something can't be read or written.
    """
    staged = staged_at(target, source)
    staged.mkdir(parents=True, exist_ok=True)
    note = _note(source)
    _delete_strangers(source, staged)
    names: dict[tuple[int, int], Path] = {}
    entries: dict[Path, FileEntry] = {}
    _copy_below(source, staged, names, entries)
    write_atomically(staged / MOVED_FROM, json.dumps(note))
    flush_tree(staged)
    for path, entry in entries.items():
        if read_entry(path, from_disk=True) != entry:
            raise CopyError(f"{path} is not what was read from {source}: the disk, or what lies before it, is at fault")
    _verify_sealed(source, staged, say)
    if _note(source) != note:
        raise CopyError(f"{source} was written to while it was copied, and stays; the same command copies what is new")
    os.rename(staged, target)
    flush_directory(target.parent)


def remove(source: Path, target: Path) -> None:
    """Delete a source of which `target` is the published copy; what is left of it is hidden meanwhile.

    Raises:
        CopyError: it was written to since it was copied.
        OSError: something of it can't be deleted.
    """
    leftover = leftover_of(source)
    if os.path.lexists(source):
        if not is_copy_of(target, source):
            way = f"delete {target}, which lacks what is new, and give the same command again"
            raise CopyError(f"{source} was written to since it was copied, and stays. To move it, {way}")
        os.rename(source, leftover)
        flush_directory(source.parent)
    remove_leftover(source, target)


def remove_leftover(source: Path, target: Path) -> None:
    """Delete what has the source's other name, and then the note of the copy; the source itself is not looked at.

    Raises:
        OSError: something of it can't be deleted.
    """
    leftover = leftover_of(source)
    if os.path.lexists(leftover):
        for directory, _, _ in os.walk(leftover):  # what may not be written to can't be emptied
            os.chmod(directory, os.stat(directory).st_mode | stat.S_IRWXU)
        delete(leftover, inside=leftover.parent)
    delete(target / MOVED_FROM, inside=target)


def _copy_below(source: Path, staged: Path, names: dict[tuple[int, int], Path], entries: dict[Path, FileEntry]) -> None:
    for path in sorted(source.iterdir()):
        if path.name in NOT_COPIED:
            continue
        copied, status = staged / path.name, path.lstat()
        inode = status.st_dev, status.st_ino
        if stat.S_ISDIR(status.st_mode):
            copied.mkdir(exist_ok=True)
            os.chmod(copied, stat.S_IRWXU)
            _copy_below(path, copied, names, entries)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(path), copied)
        elif not stat.S_ISREG(status.st_mode):
            raise CopyError(f"{path} is neither a file nor a directory nor a link; delete it, or keep it elsewhere")
        elif inode in names:
            delete(copied, inside=staged)  # the last of an earlier call's names
            os.link(names[inode], copied)
        else:
            names[inode] = copied
            entries[copied] = _copy_file(path, copied)
            continue  # it has its mode and times
        if not stat.S_ISREG(status.st_mode):
            shutil.copystat(path, copied, follow_symlinks=False)
    shutil.copystat(source, staged)


def _copy_file(path: Path, copied: Path) -> FileEntry:
    """Copy one file unless the same is there; returns the digest of what was read from the source."""
    if copied.exists() and copied.stat().st_size == path.stat().st_size:
        entry = read_entry(path)
        if read_entry(copied) == entry:
            shutil.copystat(path, copied)
            return entry
    delete(copied, inside=copied.parent)
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as read, open(copied, "xb", buffering=0) as write:
        while chunk := read.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[write.write(rest) :]
    shutil.copystat(path, copied)
    return entry_of(size, digest)


def _delete_strangers(source: Path, staged: Path) -> None:
    """Delete from a staged copy what is no plain copy: links, hard-linked names, and what the source no longer has."""
    for path in sorted(staged.iterdir()):
        original, status = source / path.name, path.lstat()
        folder = stat.S_ISDIR(status.st_mode)
        if folder:
            os.chmod(path, status.st_mode | stat.S_IRWXU)
        alike = os.path.lexists(original) and stat.S_IFMT(original.lstat().st_mode) == stat.S_IFMT(status.st_mode)
        if folder and alike:
            _delete_strangers(original, path)
        elif not alike or not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            delete(path, inside=staged)


def _verify_sealed(source: Path, staged: Path, say: Callable[[str], None]) -> None:
    """Compare every sealed checkpoint of the copy with its manifest; one that is damaged at its source is named."""
    for manifest in sorted([*staged.glob(f"checkpoints/checkpoint-*/{MANIFEST}"), staged / "final" / MANIFEST]):
        if not manifest.exists():
            continue
        copied = manifest.parent
        try:
            verify(copied)
        except CheckpointError as error:
            original = source / copied.relative_to(staged)
            try:
                verify(original)
            except CheckpointError:
                say(f"WARNING: {copied.name} does not verify, neither here nor where it comes from: {error}")
            else:
                raise CopyError(f"the copy of {original} does not verify: {error}") from None
