"""One run, read back: its state by ledger, lock and disk, and the little of its configuration that a reader needs."""

import contextlib
import fcntl
import json
import math
import socket
import time
from pathlib import Path
from typing import Any, Literal

import yaml

from outlast import progress as progress_file
from outlast.errors import ConfigError
from outlast.ledger import Attempt, Event, attempts, finished
from outlast.rundir import RunDirectory

State = Literal[
    "not_started", "queued", "running", "preempted", "interrupted", "stopped_unexpectedly",
    "failed", "cancelled", "gave_up", "finished",
]  # fmt: skip

FRESH_S = 60.0
"""Age up to which `progress.json` counts as a sign of life, where the lock can't tell (another host holds it)."""


def runs_under(root: Path) -> list[RunDirectory]:
    """The run directories directly under `root`, by name."""
    runs = [RunDirectory(path) for path in sorted(root.iterdir())] if root.is_dir() else []
    return [run for run in runs if run.config.is_file() or run.ledger.is_file()]


def run_named(name: str, root: Path) -> RunDirectory:
    """The run that a command's RUN names: a name under `root`, or a run directory's path.

    Raises:
        ConfigError: there is no such run.
    """
    path = root / name
    if not path.is_dir() and Path(name).is_dir():
        path = Path(name)
    run = RunDirectory(path.absolute())
    if run.config.is_file() or run.ledger.is_file():
        return run
    names = [other.path.name for other in runs_under(root)]
    raise ConfigError("RUN", name, names or f"valid: a run under {root.absolute()}, which holds none yet")


def state_of(run: RunDirectory, events: list[Event]) -> State:
    """The state of a run by ledger, lock and `progress.json`."""
    if finished(events):
        return "finished"
    held, tries = is_locked(run), started_attempts(events)
    if held:
        return "running"
    resubmitted = _submitted_time(run) > max((event["time"] for event in events), default=0.0)
    if not tries or resubmitted:
        return "queued" if resubmitted else "not_started"
    newest = tries[-1]
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
    """The sections of `config.yaml` as they stand, unchecked: a run stays readable when its data has moved."""
    try:
        tree = yaml.load(run.config.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        tree = None
    sections = tree if isinstance(tree, dict) else {}
    return {name: dict(sections.get(name) or {}) for name in ("storage", "trainer")}


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
    event = newest and (newest.requeued or newest.started)
    job_id = event["job_id"] if event else None
    if newest is None or _submitted_time(run) > newest.last_time:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            job_id = json.loads((run.path / "submitted.json").read_text())["job_id"]
    return None if job_id is None else str(job_id)


def _submitted_time(run: RunDirectory) -> float:
    try:
        return (run.path / "submitted.json").stat().st_mtime
    except OSError:
        return 0.0
