"""The runs that a command's arguments name, and the names by which runs are shown."""

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from outlast.errors import ConfigError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.sweep import SWEEP_MANIFEST

from .submissions import sweep_at

RECORDS = ("config.yaml", "ledger.jsonl", "progress.json", "submitted.json", "cancelled.json", SWEEP_MANIFEST)
"""What is read of a run, or of a sweep, to say where it stands."""
MOVING, MOVED = HALF_MOVED = (".moving", ".moved")
"""Ends of the hidden names of what `outlast move` copies or deletes: no run, though all files of one may be there."""


def runs_under(root: Path) -> list[RunDirectory]:
    """The runs under `root`, by name: the run directories in it, and the cells of the sweeps in it.

    What may not be read is left out: see :func:`unreadable_under`.
    """
    found = []
    closed = set(unreadable_under(root))
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path in closed or (path.name.startswith(".") and path.name.endswith(HALF_MOVED)):
            continue
        found += [RunDirectory(path)] if _is_run(path) else cells_of(path)
    return found


def unreadable_under(root: Path) -> list[Path]:
    """Directories under `root` that this user may not look into: others' runs, as a rule."""
    here = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in here if path.is_dir() and not _is_readable(path)]


def _is_readable(path: Path) -> bool:
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        return False
    there = [path / name for name in RECORDS if (path / name).exists()]
    return all(os.access(file, os.R_OK, effective_ids=True) for file in there)


def is_writable(path: Path) -> bool:
    """Whether this user may write into a run's directory: others' are shown, and left alone."""
    return not path.exists() or os.access(path, os.W_OK | os.X_OK, effective_ids=True)


def owner_of(path: Path) -> int:
    """The number of the user whose directory it is; that of this process if it is not there."""
    try:
        return path.stat().st_uid
    except OSError:
        return os.geteuid()


def owner_name(path: Path) -> str:
    """The name of the user whose directory it is."""
    return user_name(owner_of(path))


def user_name(number: int | None = None) -> str:
    """The name of a user, or the number of one without a name; this process's, if left out."""
    number = os.geteuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def cells_of(directory: Path) -> list[RunDirectory]:
    """The cells of a sweep's directory, in the order of their indices; none if it is not one."""
    sweep = sweep_at(directory)
    return [RunDirectory(directory / name) for name in sweep.cells] if sweep else []


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / "config.yaml") or os.path.isfile(path / "ledger.jsonl")


def _is_cell(path: Path) -> bool:
    """Whether a sweep names it among its cells, be it begun or not."""
    sweep = sweep_at(path.parent)
    return sweep is not None and path.name in sweep.cells


def name_of(run: RunDirectory) -> str:
    """What a user calls it: its name, for a cell `SWEEP/CELL`."""
    return f"{run.path.parent.name}/{run.path.name}" if sweep_at(run.path.parent) else run.path.name


def run_named(name: str, root: Path) -> RunDirectory:
    """The run that a command's RUN names: a name or `SWEEP/CELL` under `root`, or a run directory's path.

    Raises:
        ConfigError: there is no such run, or it is a whole sweep.
    """
    path = _directory(name, root)
    if path.is_dir() and not _is_readable(path):
        raise ConfigError("RUN", name, f"you may not read {path}, which is {owner_name(path)}'s")
    if _is_run(path) or _is_cell(path):
        return RunDirectory(path)
    if cells := cells_of(path):
        raise ConfigError("RUN", name, [name_of(cell) for cell in cells[:12]] + ["…"] * (len(cells) > 12))
    names = [name_of(other) for other in runs_under(root)]
    raise ConfigError("RUN", name, names or f"valid: a run under {root.absolute()}, which holds none yet")


def sweep_named(name: str, root: Path) -> Path | None:
    """The directory of the sweep that RUN names; None if it names none."""
    path = _directory(name, root)
    return path if not _is_run(path) and cells_of(path) else None


def runs_named(names: Sequence[str], root: Path) -> list[RunDirectory]:
    """The runs that `RUN|SWEEP|SWEEP/CELL…` name, each once; a sweep stands for all of its cells.

    Raises:
        ConfigError: there is no such run or sweep.
    """
    found: dict[Path, RunDirectory] = {}
    for name in names:
        if not _is_readable(_directory(name, root)):
            run_named(name, root)  # says what is wrong with it
        for run in cells_of(_directory(name, root)) or [run_named(name, root)]:
            found.setdefault(run.path, run)
    return list(found.values())


def is_named(name: str, root: Path) -> bool:
    """Whether there is a run or a sweep of that name."""
    path = _directory(name, root)
    return _is_run(path) or _is_cell(path) or os.path.isfile(path / SWEEP_MANIFEST)


def _directory(name: str, root: Path) -> Path:
    path = root / name
    return (Path(name) if not path.is_dir() and Path(name).is_dir() else path).absolute()
