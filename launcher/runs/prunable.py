"""What of an ended run may go to free space, decided by rule, without changing anything."""

import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from outlast.checkpoint.manifest import MANIFEST, Manifest, Sealed, read_manifest
from outlast.checkpoint.removal import UNSEALED
from outlast.checkpoint.retention import newest_full
from outlast.errors import CheckpointError, denied
from outlast.rundir.attempts import attempts
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger

from .find import is_writable
from .queue import ACTIVE
from .standing import RunStatus
from .state import State
from .submissions import submission_of

ENDED = (State.FINISHED, State.FAILED, State.GAVE_UP, State.CANCELLED)
KEEPS = ("final", "best", "newest")
"""What `--keep` may name; `final` stays in any case."""
Files = dict[tuple[int, int], tuple[int, int, int]]
"""`{(device, inode): (names counted, names there are, bytes)}`."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What may go."""

    keep: tuple[str, ...] = KEEPS
    older_s: float = 0.0
    """Seconds since a run ended, from which on it counts."""
    unfinished: bool = False
    """Also the checkpoint from which an unfinished run would resume."""


@dataclass(frozen=True)
class Item:
    """Something in a run directory that goes as a whole."""

    name: str
    """Its path in the run directory, or a checkpoint's own name."""
    path: Path
    files: Files
    sealed: Sealed | None = None


@dataclass(kw_only=True)
class Prunable:
    """What may go of one run, and what may not."""

    row: RunStatus
    version: object
    """Changes when the run does anything; see :func:`version_of`."""
    items: list[Item] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    """Sealed directories that stay, and have to be whole."""
    skipped: str | None = None
    """Why the run is left alone as a whole."""
    notes: list[str] = field(default_factory=list)
    """What is left in place although the rule names it, and why."""

    @property
    def run(self) -> RunDirectory:
        return self.row.directory


def version_of(run: RunDirectory) -> object:
    """A value that changes when an attempt starts, or the run is submitted again."""
    submitted = submission_of(run)
    size = run.ledger.stat().st_size if run.ledger.exists() else 0
    return size, submitted.time if submitted else None


def ended_at(run: RunDirectory) -> float:
    """When the run did something last, Unix seconds; later deletions do not count."""
    return max((attempt.last_time for attempt in attempts(Ledger(run.ledger).read())), default=0.0)


def prunable(row: RunStatus, version: object, rule: Rule) -> Prunable:
    """Decide what of a run may go.

    Args:
        row: fresh from `collect`.
        version: of before it was collected.
    """
    found = Prunable(row=row, version=version)
    try:
        found.skipped = _left_alone(row, rule)
        if found.skipped is None:
            _fill(found, rule)
    except OSError as error:
        found.items, found.skipped = [], denied(error) or f"{error.filename}: {error.strerror}"
    return found


def _left_alone(row: RunStatus, rule: Rule) -> str | None:
    run = row.directory
    if row.state not in ENDED or row.slurm_state in ACTIVE:
        return f"is {row.slurm_state if row.slurm_state in ACTIVE else row.state.replace('_', ' ')}, and has not ended"
    if row.note is not None:
        return f"may be in the queue: {row.note}"
    if not is_writable(run.path) or not os.access(run.ledger, os.W_OK, effective_ids=True):
        return f"is {row.owner}'s, and you may not write there"
    for path in (run.checkpoints, run.staging, run.trash, run.quarantine, run.final):
        if path.is_symlink():
            return f"{path.relative_to(run.path)} is a symbolic link, and nothing is deleted behind one"
    if time.time() - ended_at(run) < rule.older_s:
        return "ended later than --older says"
    return None


def _fill(found: Prunable, rule: Rule) -> None:
    run, finished = found.run, found.row.state == State.FINISHED
    sealed, leftovers = list[Sealed](), [path for path in (run.staging, run.trash) if path.is_dir()]
    for path in sorted(run.checkpoints.glob("checkpoint-*")):
        if path.is_symlink():
            found.notes.append(f"{path.name} is a symbolic link, and is left where it is")
        elif (path / UNSEALED).exists() and not (path / MANIFEST).exists():
            leftovers.append(path)  # an earlier deletion was interrupted
        elif manifest := _manifest(path):
            sealed.append(Sealed(path, manifest))
        elif path.is_dir():
            found.notes.append(f"{path.name} has no manifest that can be read, and is left where it is")
    sealed.sort(key=lambda checkpoint: checkpoint.step)
    has_final = finished and _manifest(run.final) is not None
    known = [checkpoint for checkpoint in sealed if checkpoint.manifest.best_step is not None]
    best_step = known[-1].manifest.best_step if known else None
    must = not (has_final or (rule.unfinished and not finished))  # nothing else has what was trained
    newest = newest_full(sealed) or (sealed[-1] if sealed else None)
    if must and found.notes and (newest is None or newest.light):
        found.skipped = (
            "has no checkpoint that can be resumed from, and something in it can't be read: look at that first"
        )
        return
    kept = [checkpoint for checkpoint in sealed if checkpoint is newest and (must or "newest" in rule.keep)]
    kept += [c for c in sealed if c not in kept and "best" in rule.keep and c.step == best_step]
    if rule.unfinished and not finished:
        kept = [c for c in kept if c is not newest or ("best" in rule.keep and c.step == best_step)]
    found.kept = [checkpoint.path for checkpoint in kept] + ([run.final] if has_final else [])
    going = [Item(c.path.name, c.path, files_in(c.path), c) for c in sealed if c not in kept]
    aside = [run.quarantine] if run.quarantine.is_dir() and has_final and any(run.quarantine.iterdir()) else []
    for path in (*leftovers, *aside, *([run.reserve] if run.reserve.is_file() else [])):
        going.append(Item(path.relative_to(run.path).as_posix(), path, files_in(path)))
    for item in going:
        if item.files or item.path not in (run.staging, run.trash):
            protected = _write_protected(item.path)
            if protected is None:
                found.items.append(item)
            else:
                found.notes.append(
                    f"{protected.relative_to(run.path)} is write-protected: {item.name} stays (chmod u+w)"
                )


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path, patient=False)
    except CheckpointError:
        return None


def _paths(path: Path) -> Iterable[tuple[Path, os.stat_result]]:
    """Everything at and below `path`, no link followed."""
    status = path.lstat()
    yield path, status
    if stat.S_ISDIR(status.st_mode):
        for below in sorted(path.iterdir()):
            yield from _paths(below)


def _write_protected(path: Path) -> Path | None:
    """The first file or directory, at or below `path`, that somebody has protected from being changed."""
    for found, status in _paths(path):
        if stat.S_ISLNK(status.st_mode):
            continue
        closed = stat.S_ISDIR(status.st_mode) and not os.access(found, os.W_OK | os.X_OK, effective_ids=True)
        if closed or not status.st_mode & 0o222:
            return found
    return None


def files_in(path: Path) -> Files:
    """The regular files at and below `path`, each once however many names it has there."""
    files: Files = {}
    for _, status in _paths(path):
        if stat.S_ISREG(status.st_mode):
            key = status.st_dev, status.st_ino
            files[key] = files.get(key, (0, 0, 0))[0] + 1, status.st_nlink, status.st_size
    return files


def bytes_freed(items: Iterable[Item]) -> int:
    """Bytes that become free when all of these go: a file with another name elsewhere (a hard link) frees none."""
    together: Files = {}
    for item in items:
        for key, (names, links, size) in item.files.items():
            together[key] = together.get(key, (0, 0, 0))[0] + names, links, size
    return sum(size for names, links, size in together.values() if names >= links)
