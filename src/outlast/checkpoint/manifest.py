"""The manifest is written last into a checkpoint and removed first, so its presence means "whole".

It lists every file with its size and xxh3-128 digest, and ends with a digest of itself. That finds torn, missing,
corrupted and foreign files; it does not protect against forgery, so what is read must not be able to do harm. Only a
wrong size, a wrong digest, a missing file or one that does not belong there is damage: other errors may pass, so
reading is tried again.
"""

import errno
import functools
import json
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from outlast.errors import CheckpointError, ResumeRefusedError
from outlast.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1
READ_BYTES = 1 << 22
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What the system says of a file that is not there, or is something else. All its other errors may pass."""
LASTING = (errno.EIO, errno.EACCES, errno.EPERM)
"""Errors that may pass, and otherwise concern this file alone: a bad sector, another owner."""
WAITS_S = (0.1, 0.3, 1.0, 2.0)
"""Seconds before each new try of a read that failed."""
T = TypeVar("T")
FileEntry = dict[str, Any]
"""`{"bytes": int, "xxh3_128": hex digest}`."""
RESUME_ONLY = (
    "optimizer.pt", "optimizer.bin", "optimizer_*/*", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth",
    "random_states_*.pkl", "sampler*.bin", "global_step*/*", "latest", "zero_to_*.py",
    "kept_state_*.pt", "digests_*.json",
)  # fmt: skip
"""Files that only a resume needs, as the Trainer, accelerate and DeepSpeed name them."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
PACKAGES = ("outlast", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")


class Kind(StrEnum):
    """Why a checkpoint was made."""

    PERIODIC = "periodic"
    EMERGENCY = "emergency"
    FINAL = "final"


class TransientError(CheckpointError):
    """The checkpoint can't be read just now; it may be whole, and the next attempt may succeed."""


class UnreadableError(CheckpointError):
    """The checkpoint could not be read, however often it was tried; nothing says that it is damaged."""


class NewerFormatError(ResumeRefusedError):
    """The checkpoint was made by a newer version of outlast; it is left as it is."""


@dataclass(kw_only=True)
class Manifest:
    """What a sealed checkpoint records about itself."""

    step: int
    kind: str
    """A :class:`Kind`."""
    world_size: int
    time: float
    """When it was sealed, Unix seconds."""
    pending_evaluation: bool = False
    """An evaluation was due at this step and was cut short or not begun: it is run first on resume."""
    light: bool = False
    """Only what evaluation and deployment need is left: it can't be resumed from."""
    best_step: int | None = None
    """Step of the best checkpoint by the metric, as known when this one was sealed."""
    origin: dict[str, Any] = field(default_factory=dict)
    """The facts about the run that the contents depend on (see `compatibility.py`)."""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    """`{relative path: FileEntry}`."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Size of the files, the manifest itself not counted."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


@dataclass(frozen=True)
class Sealed:
    """A sealed checkpoint on disk."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def light(self) -> bool:
        return self.manifest.light

    @property
    def bytes(self) -> int:
        return self.manifest.bytes

    @property
    def resume_bytes(self) -> int:
        """Bytes that only a resume needs."""
        return sum(int(entry["bytes"]) for name, entry in self.manifest.files.items() if resume_only(name))

    @property
    def lightable(self) -> bool:
        """Whether removing what only a resume needs would free bytes and leave the weights."""
        return not self.light and self.resume_bytes > 0 and any(map(is_weights, self.manifest.files))


def resume_only(name: str) -> bool:
    """Whether only a resume needs the file with this path in the checkpoint."""
    return any(fnmatch(name, pattern) for pattern in RESUME_ONLY)


def is_weights(name: str) -> bool:
    """Whether the file with this path in the checkpoint holds the model's or the adapter's weights."""
    return any(fnmatch(name, pattern) for pattern in WEIGHTS) and not resume_only(name)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of packages, by their installed metadata; by default of those that decide what a checkpoint holds."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest as a whole, its own digest last, and flush it."""
    values = asdict(manifest)
    write_atomically(directory / MANIFEST, json.dumps(values | {"digest": _digest(values)}, indent=1))


def _digest(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path, *, patient: bool = True) -> Manifest:
    """The manifest of a checkpoint, which has to be that of a directory of this name.

    Args:
        patient: try again, for a few seconds, after an error that may pass.

    Raises:
        NewerFormatError: another version of outlast has made it.
        TransientError: the file system does not answer just now.
        UnreadableError: it can't be read, now or later.
        CheckpointError: there is none, or it is damaged; the message is the reason, in words.
    """

    def read() -> bytes:
        if not stat.S_ISREG(os.lstat(directory / MANIFEST).st_mode):  # reading a pipe would not end
            raise CheckpointError("its manifest is a link or another special file")
        return (directory / MANIFEST).read_bytes()

    try:
        values = json.loads(_tried(read) if patient else read())
    except FileNotFoundError:
        raise CheckpointError("it has no manifest: it was never sealed") from None
    except (OSError, ValueError) as error:
        raise _unreadable("its manifest", error) from None
    if not isinstance(values, dict):
        raise CheckpointError("its manifest can't be read: it is no JSON object")
    known = {f.name for f in fields(Manifest)}
    own, made = values.pop("digest", None), values.get("format", 0)
    if made != FORMAT or known < values.keys():
        by = (values.get("versions") or {}).get("outlast", "unknown")
        raise NewerFormatError(
            f"{directory.name} was made by another outlast (version {by}, format {made}); this one reads {FORMAT}: "
            "upgrade outlast, and the same command resumes. Nothing was moved"
        )
    if own is not None and own != _digest(values):  # the first versions wrote none
        raise CheckpointError("its manifest differs from what was written (xxh3-128 of itself)")
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise _unreadable("its manifest", error) from None
    prefix, _, number = directory.name.partition("-")
    if prefix == "checkpoint" and number.isdecimal() and manifest.step != int(number):
        raise CheckpointError(f"its manifest says step {manifest.step}, but the directory is {directory.name}")
    return manifest


def verify(directory: Path, *, from_disk: bool = False, for_use: bool = False) -> Manifest:
    """Compare every file with the manifest: presence, size, digest; nothing else may be there, links least of all.

    Args:
        from_disk: see :func:`read_entry`.
        for_use: read only the files that the model needs, if its weights are among them; a resume needs all.

    Raises:
        CheckpointError: the first difference, in words; or as :func:`read_manifest`.
    """
    manifest = read_manifest(directory)
    _check_tree(directory, manifest)
    needed = {name: entry for name, entry in manifest.files.items() if not resume_only(name)}
    files = needed if for_use and any(map(is_weights, needed)) else manifest.files
    check_files(directory, files, from_disk=from_disk)
    return manifest


def _check_tree(directory: Path, manifest: Manifest) -> None:
    """Refuse links, files that the manifest does not list, and names in it that are none of a file in there."""
    try:
        found = _tried(lambda: _files(directory))
    except OSError as error:
        raise _unreadable(error.filename or directory.name, error) from None
    for name in sorted(found.keys() | manifest.files.keys()):
        if not found.get(name, True):
            raise CheckpointError(f"{name} is a link or another special file; only regular files are read")
        if name in found and name not in manifest.files and not _may_lie_there(name, light=manifest.light):
            raise CheckpointError(f"{name} is not in its manifest: it was put there later")
        if name not in found and os.path.lexists(directory / name):
            raise CheckpointError(f"its manifest lists {name}, which is no regular file in it")


def _files(directory: Path) -> dict[str, bool]:
    """List all that is below `directory` and is no directory, by relative path: whether it is a regular file."""
    found, pending = dict[str, bool](), [""]
    while pending:
        above = pending.pop()
        with os.scandir(directory / above) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{above}{entry.name}/")
                else:
                    found[above + entry.name] = entry.is_file(follow_symlinks=False)
    return found


def _may_lie_there(name: str, *, light: bool) -> bool:
    """Whether a file may be in a checkpoint without being listed: nothing reads it, and it may go at any moment."""
    temporary = fnmatch(name, f".{MANIFEST}.*.tmp") or fnmatch(name.rpartition("/")[2], ".nfs[0-9a-f]*")
    return name == MANIFEST or temporary or (light and resume_only(name))  # which was being lightened


def check_files(directory: Path, files: dict[str, FileEntry], *, from_disk: bool = False) -> None:
    """Compare files with their entries in a manifest.

    Args:
        files: `{relative path: FileEntry}`.
        from_disk: see :func:`read_entry`.

    Raises:
        CheckpointError: as :func:`verify`.
    """
    for name, entry in files.items():
        path = directory / name
        try:
            size = _tried(path.stat).st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{name} has {size} bytes, the manifest says {entry['bytes']}")
            if _tried(functools.partial(read_entry, path, from_disk=from_disk)) != entry:
                raise CheckpointError(f"{name} differs from what was written (xxh3-128)")
        except OSError as error:
            raise _unreadable(name, error) from None


def _tried(read: Callable[[], T]) -> T:
    """What `read` returns; while it fails with an error that may pass, it is called again, a few times."""
    for wait_s in WAITS_S:
        try:
            return read()
        except OSError as error:
            if error.errno in MISSING:
                raise
            time.sleep(wait_s)
    return read()


def _unreadable(what: str, error: Exception) -> CheckpointError:
    if not isinstance(error, OSError):
        return CheckpointError(f"{what} can't be read: {error}")
    damaged = error.errno in MISSING
    kind = CheckpointError if damaged else UnreadableError if error.errno in LASTING else TransientError
    return kind(f"{what} can't be read: {error.strerror}")


def entry_of(size: int, digest: "xxhash.xxh3_128") -> FileEntry:
    """The entry of a file in the manifest."""
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def read_entry(path: Path, *, from_disk: bool = False) -> FileEntry:
    """Read a file and return the entry that the manifest should have for it.

    Args:
        from_disk: drop the kernel's cached copy first, so that the disk itself is read; only for a flushed file.

    Raises:
        OSError: it can't be read.
    """
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
        return entry_of(file.tell(), digest)
