"""The runs that a command's arguments name, and the names by which runs are shown."""

import os
from collections.abc import Sequence
from pathlib import Path

from outlast.errors import ConfigError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.sweep import SWEEP_MANIFEST

from .submissions import sweep_at


def runs_under(root: Path) -> list[RunDirectory]:
    """The runs under `root`, by name: the run directories in it, and the cells of the sweeps in it.

    What may not be read is left out: see :func:`unreadable_under`.
    """
    found = []
    closed = set(unreadable_under(root))
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path in closed:
            continue
        found += [RunDirectory(path)] if _is_run(path) else cells_of(path)
    return found


def unreadable_under(root: Path) -> list[Path]:
    """Directories under `root` that this user may not look into: others' runs, as a rule."""
    here = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in here if path.is_dir() and not _readable(path)]


def _readable(path: Path) -> bool:
    ledger = path / "ledger.jsonl"
    return os.access(path, os.R_OK | os.X_OK, effective_ids=True) and (
        not ledger.exists() or os.access(ledger, os.R_OK, effective_ids=True)
    )


def cells_of(directory: Path) -> list[RunDirectory]:
    """The cells of a sweep's directory, in the order of their indices; none if it is not one."""
    sweep = sweep_at(directory)
    return [RunDirectory(directory / name) for name in sweep.cells] if sweep else []


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "ledger.jsonl").is_file()


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
    if _is_run(path) or _is_cell(path):
        return RunDirectory(path)
    if cells := cells_of(path):
        raise ConfigError("RUN", name, [name_of(cell) for cell in cells[:12]] + ["…"] * (len(cells) > 12))
    names = [name_of(other) for other in runs_under(root)]
    raise ConfigError("RUN", name, names or f"valid: a run under {root.absolute()}, which holds none yet")


def runs_named(names: Sequence[str], root: Path) -> list[RunDirectory]:
    """The runs that `RUN|SWEEP|SWEEP/CELL…` name, each once; a sweep stands for all of its cells.

    Raises:
        ConfigError: there is no such run or sweep.
    """
    found: dict[Path, RunDirectory] = {}
    for name in names:
        for run in cells_of(_directory(name, root)) or [run_named(name, root)]:
            found.setdefault(run.path, run)
    return list(found.values())


def is_named(name: str, root: Path) -> bool:
    """Whether there is a run or a sweep of that name."""
    path = _directory(name, root)
    return _is_run(path) or _is_cell(path) or (path / SWEEP_MANIFEST).is_file()


def _directory(name: str, root: Path) -> Path:
    path = root / name
    return (Path(name) if not path.is_dir() and Path(name).is_dir() else path).absolute()
