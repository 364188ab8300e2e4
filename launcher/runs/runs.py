"""One run, read back: its state by ledger, lock and disk, and the little of its configuration that a reader needs."""

import fcntl
import json
import math
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from outlast.errors import ConfigError
from outlast.rundir import progress as progress_file
from outlast.rundir.attempts import Attempt, attempts, finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Event
from outlast.rundir.sweep import MANIFEST

from .submissions import cancelled_at, submission_of, sweep_at

State = Literal[
    "not_started", "queued", "running", "preempted", "interrupted", "stopped_unexpectedly",
    "failed", "cancelled", "gave_up", "finished",
]  # fmt: skip

STATES: tuple[State, ...] = get_args(State)

FRESH_S = 60.0
"""Age up to which `progress.json` counts as a sign of life, where the lock can't tell (another host holds it)."""


def runs_under(root: Path) -> list[RunDirectory]:
    """The runs under `root`, by name: the run directories in it, and the cells of the sweeps in it."""
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        found += [RunDirectory(path)] if _is_run(path) else cells_of(path)
    return found


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
    return _is_run(path) or _is_cell(path) or (path / MANIFEST).is_file()


def _directory(name: str, root: Path) -> Path:
    path = root / name
    return (Path(name) if not path.is_dir() and Path(name).is_dir() else path).absolute()


def state_of(run: RunDirectory, events: list[Event]) -> State:
    """The state of a run by ledger, lock and `progress.json`, by its submission, and by whether it was cancelled."""
    if finished(events):
        return "finished"
    held, tries = is_locked(run), started_attempts(events)
    if held:
        return "running"
    submission, cancelled = submission_of(run), cancelled_at(run) or 0.0
    submitted, newest = submission.time if submission else 0.0, tries[-1] if tries else None
    began = newest.started["time"] if newest and newest.started else 0.0
    if cancelled > max(submitted, began) and (newest is None or newest.ended or newest.requeued):
        return "cancelled"
    resubmitted = submitted > max((event["time"] for event in events), default=0.0)
    if newest is None or resubmitted:
        return "queued" if resubmitted else "not_started"
    if any(event["event"] == "gave_up" and event["attempt"] >= newest.number for event in events):
        return "gave_up"
    if newest.requeued is not None:
        return "queued"
    if newest.ended is None:
        now = progress_file.read(run)
        alive = held is None and now is not None and time.time() - now.time < FRESH_S
        return "running" if alive and now and now.phase != "done" else "stopped_unexpectedly"
    match newest.ended["cause"]:
        case "failed" | "cancelled" | "finished" as cause:
            return cause  # type: ignore[no-any-return]
        case "out_of_memory":
            return "failed"
        case _:
            return "interrupted" if job_id_of(run, newest) is None else "preempted"


def started_attempts(events: list[Event]) -> list[Attempt]:
    """The attempts that did anything: a number that only `gave_up` or `deleted` lines bear is none."""
    return [a for a in attempts(events) if a.started or a.resumed or a.ended or a.checkpoints or a.signals]


def is_locked(run: RunDirectory) -> bool | None:
    """Whether a living process holds the run; None if that can't be known from this host."""
    try:
        with open(run.lock, "rb") as file:
            try:
                # Shared and for an instant: it stops no other reader, and a starting attempt tries again.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            holder = json.loads(file.read())
    except (OSError, ValueError):
        return None
    # Not every shared file system shows the locks of other hosts: "free" is sure only about a holder of this host.
    return False if isinstance(holder, dict) and holder.get("host") == socket.gethostname() else None


def settings_of(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Two sections of `config.yaml` as they stand, unchecked: a run stays readable when its data has moved.

    Only these two are parsed, which takes a third of the time: it is done for a thousand runs at once.
    """
    try:
        text = run.config.read_text(errors="replace")
    except OSError:
        text = ""
    return {name: _section(text, name) for name in ("storage", "trainer")}


def _section(text: str, name: str) -> dict[str, Any]:
    found = re.search(rf"^{name}:.*\n?(?:[ #].*\n?|\n)*", text, re.MULTILINE)
    try:
        tree = yaml.load(found[0], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if found else None
    except yaml.YAMLError:
        tree = None
    section = tree.get(name) if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


def budget_of(settings: dict[str, dict[str, Any]]) -> int | None:
    """`storage.budget_gb` in bytes."""
    budget = settings["storage"].get("budget_gb")
    return None if budget is None else int(float(budget) * 1e9)


def evaluations(events: list[Event], trainer: dict[str, Any]) -> list[dict[str, Any]]:
    """All values of the metric that decides which checkpoint is the best: `name`, `value`, `step`."""
    wanted = _deciding_metric(trainer)
    return [
        {"name": name, "value": value, "step": event["step"]}
        for event in events
        if event["event"] == "evaluated"
        for name, value in event["metrics"].items()
        if name.removeprefix("eval_") == wanted and isinstance(value, int | float) and math.isfinite(value)
    ]


def best_metric(events: list[Event], trainer: dict[str, Any]) -> dict[str, Any] | None:
    """The best evaluation, by the Trainer's own rule: `metric_for_best_model`, lower is better for a loss."""
    greater = trainer.get("greater_is_better")
    sign = 1 if (greater if greater is not None else not _deciding_metric(trainer).endswith("loss")) else -1
    return max(evaluations(events, trainer), key=lambda evaluation: sign * evaluation["value"], default=None)


def _deciding_metric(trainer: dict[str, Any]) -> str:
    return str(trainer.get("metric_for_best_model") or "loss").removeprefix("eval_")


def job_id_of(run: RunDirectory, newest: Attempt | None) -> str | None:
    """The job that was named last: by the submission, by the newest attempt, or by its requeue."""
    submission = submission_of(run)
    if submission is not None and (newest is None or submission.time > newest.last_time):
        return submission.job_id
    event = newest and (newest.requeued or newest.started)
    return None if not event or event["job_id"] is None else str(event["job_id"])
