"""Notices that the files a run's data comes from have changed since its last attempt.

Later attempts read what the first one prepared, so a changed file would have no effect, or would move the rows under
a checkpoint that counts them. The digests of the files are part of each checkpoint's origin, and stand beside the
prepared data.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import xxhash

from outlast.checkpoint.compatibility import origin_of
from outlast.config.configuration import Config
from outlast.config.data import HubData, JsonlData
from outlast.deletion import delete
from outlast.errors import ResumeRefusedError
from outlast.files import read_json, write_atomically
from outlast.rundir import ancestry
from outlast.rundir.directory import RunDirectory

RECORD = "source.json"
"""The digests of the data that was prepared, in `prepared/` of the run directory."""

SPARED = "files of the data are gone: the run goes on with what was prepared from them"
"""What a plan says of such a run."""


def digests(config: Config) -> dict[str, str]:
    """Digest the files of the data, by the key that names them; empty if they are no files of the user's.

    Raises:
        ResumeRefusedError: a file can't be read.
    """
    named = _named(config)
    if spared(config):
        return _recorded(config)
    try:
        return {key: _digest(path) for key, path in named.items()}
    except OSError as error:
        raise ResumeRefusedError(f"data: {error.filename} can't be read: {error.strerror}") from None


def spared(config: Config) -> bool:
    """Whether files of the data are gone, and not needed: what was prepared from them is there, for all attempts."""
    prepared = RunDirectory(config.directory).prepared / "data" / "prepared.json"
    gone = any(not os.access(path, os.R_OK) for path in _named(config).values())
    return gone and prepared.is_file() and _recorded(config).keys() == _named(config).keys()


def prepared_rows(config: Config) -> int:
    """The rows that were prepared."""
    rows = read_json(RunDirectory(config.directory).prepared / "data" / "prepared.json")
    return sum(rows.values()) if isinstance(rows, dict) else 0


def _named(config: Config) -> dict[str, Path]:
    """The user's files that the data comes from, by the key that names them; a dataset on the hub is none."""
    match config.data:
        case JsonlData() as data:
            named = {"data.train": data.train, "data.eval": data.eval}
        case HubData() as data if data.path and (Path(data.path).expanduser().is_dir() or _recorded(config)):
            named = {"data.path": data.path}
        case _:
            named = {}
    return {key: Path(path).expanduser() for key, path in named.items() if path}


def _recorded(config: Config) -> dict[str, str]:
    record = read_json(RunDirectory(config.directory).prepared / RECORD)
    return record if isinstance(record, dict) else {}


def check(config: Config, now: dict[str, str]) -> None:
    """Refuse data that has changed since the run's newest checkpoint, unless `checkpoint.allow` has `dataset`.

    Args:
        now: as :func:`digests` returns it.

    Raises:
        ResumeRefusedError: it names the files and the ways out.
    """
    made = (origin_of(RunDirectory(config.directory)) or {}).get("source") or {}
    changed = [key for key in made.keys() & now.keys() if made[key] != now[key]]
    if changed and "dataset" not in config.checkpoint.allow:
        files = " and ".join(f"{key} ({getattr(config.data, key[5:])})" for key in sorted(changed))
        raise ResumeRefusedError(
            f"{files}: changed since the run's last checkpoint was made, which counts its rows. Put it back as it was; "
            "or go on with what is there now, with checkpoint.allow=[dataset]; or start another run, with run.name=…"
        )


def clear_changed(run: RunDirectory, now: dict[str, str]) -> bool:
    """Remove what was prepared from other data; one rank alone calls it.

    A tiny model's own tokenizer is made of the data too. It is kept if there are weights that know it: a checkpoint,
    or those of another run that this one begins with.

    Returns:
        Whether anything was removed.

    Raises:
        ResumeRefusedError: it can't be removed.
    """
    before = read_json(run.prepared / RECORD)
    if not isinstance(before, dict) or before == now:
        return False
    begun = "source" in (origin_of(run) or {})
    try:
        for stale in [run.prepared / "data"] if begun else ancestry.own_preparations(run):
            delete(stale, inside=run.path)
    except OSError as error:
        raise ResumeRefusedError(
            f"{run.prepared} was made of other data, and can't be removed: {error.filename}: {error.strerror}"
        ) from None
    return True


def keep(run: RunDirectory, now: dict[str, str]) -> None:
    """Write beside the prepared data what it was made of; one rank alone calls it."""
    write_atomically(run.prepared / RECORD, json.dumps(now))


def _digest(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files]
    return _digest_of(path, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@lru_cache(maxsize=64)
def _digest_of(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Digest names and contents, once for all the cells of a sweep."""
    digest = xxhash.xxh3_128()
    for file, size, _ in files:
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
