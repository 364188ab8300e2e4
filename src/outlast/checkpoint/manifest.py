"""The manifest is written last into a checkpoint and removed first, so its presence means "whole".

It lists every file with its size and xxh3-128 digest. That finds torn, missing and corrupted files; it
does not protect against forgery.
"""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from outlast.errors import CheckpointError
from outlast.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1
READ_BYTES = 1 << 22
TRANSIENT = (errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
"""Errors that may pass: a file system does not answer, or the process lacks memory or file handles."""
FileEntry = dict[str, Any]
"""`{"bytes": int, "xxh3_128": hex digest}`."""
RESUME_ONLY = (
    "optimizer.pt", "optimizer.bin", "optimizer_*/*", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth",
    "random_states_*.pkl", "sampler*.bin", "global_step*/*", "latest", "zero_to_*.py", "digests_*.json",
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
    """Write the manifest as a whole and flush it."""
    write_atomically(directory / MANIFEST, json.dumps(asdict(manifest), indent=1))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        TransientError: the file system does not answer just now.
        CheckpointError: there is none, or it can't be read; the message is the reason, in words.
    """
    try:
        values = json.loads((directory / MANIFEST).read_text())
        manifest = Manifest(**values)
    except FileNotFoundError:
        raise CheckpointError("it has no manifest: it was never sealed") from None
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable("its manifest", error) from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"its manifest has format {manifest.format}; this version of outlast reads {FORMAT}")
    return manifest


def verify(directory: Path, *, from_disk: bool = False) -> Manifest:
    """Compare every file with the manifest: presence, size, digest.

    Args:
        from_disk: see :func:`read_entry`.

    Raises:
        TransientError: the file system does not answer just now.
        CheckpointError: the first difference, in words.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{name} has {size} bytes, the manifest says {entry['bytes']}")
            if read_entry(path, from_disk=from_disk) != entry:
                raise CheckpointError(f"{name} differs from what was written (xxh3-128)")
        except OSError as error:
            raise _unreadable(name, error) from None
    return manifest


def _unreadable(what: str, error: Exception) -> CheckpointError:
    transient = isinstance(error, OSError) and error.errno in TRANSIENT
    reason = error.strerror if isinstance(error, OSError) else error
    return (TransientError if transient else CheckpointError)(f"{what} can't be read: {reason}")


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
