"""How a run was submitted, alone or as a cell of a sweep, and whether it was cancelled.

The ledger holds what attempts did. These two come from a machine on which no attempt may run, and have files of their
own: on a network file system, two hosts that append to one file overwrite each other.
"""

import getpass
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from outlast.deletion import delete
from outlast.errors import OutlastError
from outlast.files import read_json, write_atomically
from outlast.rundir.directory import RunDirectory
from outlast.rundir.place import is_of_another
from outlast.rundir.submission import Submission
from outlast.rundir.sweep import SWEEP_MANIFEST, read_sweep_manifest

SUBMITTED = "submitted.json"
CANCELLED = "cancelled.json"


@dataclass(frozen=True)
class Submitted:
    """The newest submission of a run."""

    submission: Submission
    task: int | None = None
    """Its task in the array, for the cell of a sweep."""

    @property
    def time(self) -> float:
        return self.submission.time

    @property
    def job_id(self) -> str | None:
        """As Slurm's commands take it (`123`, `123_4`); None: `sbatch` was killed before it could say."""
        return self.job_id_in(self.submission.job_id)

    def job_id_in(self, whole: str | None) -> str | None:
        return whole if self.task is None or whole is None else f"{whole}_{self.task}"

    @property
    def log(self) -> Path | None:
        """The batch job's own log."""
        text, whole = self.submission.log, self.submission.job_id
        if whole is None:
            return None
        return Path(text.replace("%A", whole).replace("%a", str(self.task)).replace("%j", whole))


@dataclass(frozen=True)
class Sweep:
    """A sweep's directory, by its manifest."""

    path: Path
    cells: tuple[str, ...]
    """Directories of the cells, under the sweep's, by index."""
    newest: dict[str, Submitted]
    """By cell's directory: its newest submission as a task of an array."""


def sweep_at(path: Path) -> Sweep | None:
    """The sweep whose directory this is, or None."""
    try:
        stat = os.stat(path / SWEEP_MANIFEST)
    except OSError:
        return None
    return _sweep(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _sweep(path: Path, *version: int) -> Sweep | None:
    """Read a sweep's manifest once for all of its cells, and again when it has changed."""
    try:
        manifest = read_sweep_manifest(path)
    except OutlastError:
        return None
    names = {cell.index: cell.directory for cell in manifest.cells}
    newest: dict[str, Submitted] = {}
    own = [one for one in manifest.submissions if not is_of_another(one.place, path)]
    for submission in sorted(own, key=lambda one: one.time):
        for index in submission.indices or ():
            if index in names:
                newest[names[index]] = Submitted(submission, index - submission.offset)
    return Sweep(path, tuple(names[index] for index in sorted(names)), newest)


def submission_of(run: RunDirectory) -> Submitted | None:
    """How the run was submitted last, by itself or with its sweep. None if it was not, though a copy of it was."""
    record = read_json(run.path / SUBMITTED)
    sweep = sweep_at(run.path.parent)
    found = [sweep.newest.get(run.path.name)] if sweep else []
    if isinstance(record, dict) and not is_of_another(record.get("place"), run.path):
        with suppress(TypeError):  # a field is missing: it is damaged
            found += [Submitted(Submission(**{f.name: record[f.name] for f in fields(Submission) if f.name in record}))]
    return max((one for one in found if one), key=lambda one: one.time, default=None)


def cancelled_at(run: RunDirectory) -> float | None:
    """When a user cancelled the run, Unix seconds; None if nobody did."""
    record = read_json(run.path / CANCELLED)
    return record.get("time") if isinstance(record, dict) else None


def mark_cancelled(run: RunDirectory, job_id: str | None) -> None:
    """Note that a user cancelled the run: it stays cancelled until it is submitted, or started, again."""
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    run.path.mkdir(parents=True, exist_ok=True)  # a cell may not have begun
    text = json.dumps({"time": time.time(), "by": by, "job_id": job_id})
    write_atomically(run.path / CANCELLED, text, durable=False)


def unmark_cancelled(run: RunDirectory) -> None:
    """Take the mark back: the run could not be cancelled."""
    delete(run.path / CANCELLED, inside=run.path)
