"""A list of the files of a directory that is prepared once, with their digests: `files.json`, which digests itself."""

import json
from pathlib import Path

import xxhash

from outlast.errors import CheckpointError
from outlast.files import read_json

from .manifest import FileEntry, check_files
from .writer import adopt

LISTING = "files.json"


def write_listing(directory: Path) -> None:
    """List all files that are in the directory now."""
    files: dict[str, dict[str, object]] = {}
    adopt(directory, files)
    (directory / LISTING).write_text(json.dumps({"files": files, "digest": _digest(files)}, indent=1))


def check_listing(directory: Path) -> dict[str, FileEntry]:
    """Compare the files with the list; a directory without one, made by an older version, is taken as it is.

    Returns:
        The list.

    Raises:
        CheckpointError: the first difference, in words.
    """
    if not (directory / LISTING).exists():
        return {}
    found = read_json(directory / LISTING)
    values = found if isinstance(found, dict) else {}
    files = values.get("files")
    if not isinstance(files, dict) or values.get("digest") != _digest(files):
        raise CheckpointError(f"{LISTING} differs from what was written (xxh3-128 of itself)")
    check_files(directory, files)
    return files


def _digest(files: object) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()
