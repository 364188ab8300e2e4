"""The manifest: written last into a checkpoint and removed first, so that its presence means "whole".

It lists every file with its size and xxh3-128 digest. That finds torn, missing and rotten files; it is not meant to
resist somebody who forges one.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from outlast.errors import CheckpointError
from outlast.rundir import flush_directory, write_atomically

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 1 << 22
PACKAGES = ("outlast", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")


@dataclass(kw_only=True)
class Manifest:
    """What a sealed checkpoint says of itself."""

    step: int
    kind: str
    """`periodic`, `emergency`, or `final`."""
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
    """What the run was (see `origin.py`)."""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`{relative path: {"bytes": int, "xxh3_128": hex digest}}`."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Size of the files, the manifest itself not counted."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


def versions() -> dict[str, str]:
    """Versions of the installed packages that decide what a checkpoint holds."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def seal(directory: Path, manifest: Manifest) -> None:
    """Flush every file of `directory`, then write its manifest: from here on it counts.

    Raises:
        OSError: the disk refused; no manifest has been written.
    """
    for path in files_of(directory):
        manifest.files[path.relative_to(directory).as_posix()] = _flush_and_digest(path)
    for path in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        flush_directory(path)
    write_manifest(directory, manifest)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest as a whole and flush it."""
    write_atomically(directory / MANIFEST, json.dumps(asdict(manifest), indent=1))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it can't be read; the message is the reason, in words.
    """
    try:
        values = json.loads((directory / MANIFEST).read_text())
        manifest = Manifest(**values)
    except FileNotFoundError:
        raise CheckpointError("it has no manifest: it was never sealed") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"its manifest can't be read: {error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"its manifest has format {manifest.format}; this version of outlast reads {FORMAT}")
    return manifest


def verify(directory: Path) -> Manifest:
    """Compare every file with the manifest: presence, size, digest.

    Raises:
        CheckpointError: the first difference, in words.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{name} has {size} bytes, the manifest says {entry['bytes']}")
            if _digest(path) != entry["xxh3_128"]:
                raise CheckpointError(f"{name} differs from what was written (xxh3-128)")
        except OSError as error:
            raise CheckpointError(f"{name} can't be read: {error.strerror}") from None
    return manifest


def files_of(directory: Path) -> list[Path]:
    """Its files, at any depth, but for a manifest; sorted."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def flush_files(directory: Path) -> None:
    """Flush this rank's view of every file to disk. On a network file system only the writing node can."""
    for path in files_of(directory):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _flush_and_digest(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        size = file.tell()
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
