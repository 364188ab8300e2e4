"""What the runs under a root are doing: one row a run, from ledger, lock and disk, and one look at Slurm's queue."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from outlast import progress as progress_file
from outlast.errors import Exit, SlurmError
from outlast.ledger import Ledger
from outlast.rundir import RunDirectory
from outlast.storage import bytes_used

from .progress_bar import duration, eta_s, size
from .runs import State, best_metric, budget_of, job_id_of, runs_under, settings_of, started_attempts, state_of

Queue = Callable[[list[str]], dict[str, str]]

NO_ANSWER = "Slurm does not answer; states are from the ledger"
COLOURS: dict[State, str] = {
    "not_started": "dim",
    "queued": "cyan",
    "running": "green",
    "preempted": "yellow",
    "interrupted": "yellow",
    "stopped_unexpectedly": "red",
    "failed": "red",
    "cancelled": "magenta",
    "gave_up": "red",
    "finished": "bold green",
}
HINTS: dict[State, str] = {
    "preempted": "preempted: saved, waits for its requeue",
    "interrupted": "interrupted: saved; the same command resumes it",
    "stopped_unexpectedly": "stopped unexpectedly: the same command resumes it from its last checkpoint",
    "gave_up": "gave up: restarts made no progress; its ledger and its logs say why",
}
"""What a state means for the reader, printed once under the table."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One row. Times in seconds, sizes in bytes; None where nothing is known."""

    name: str
    path: str
    state: State
    attempts: int
    step: int
    total_steps: int | None
    eta_s: float | None
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    bytes_used: int | None
    budget_bytes: int | None
    loss: float | None
    best: dict[str, Any] | None
    """Best evaluation: name, value, step."""
    job_id: str | None
    """The Slurm job that runs it, or will."""
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def main(root: Path, *, as_json: bool) -> int:
    """`outlast status`."""
    rows = collect(root)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        render(rows, Console(highlight=False))
    return Exit.DONE


def collect(root: Path, queue: Queue | None = None) -> list[RunStatus]:
    """The status of every run under `root`.

    Args:
        queue: maps Slurm job ids to their states, leaving out those that Slurm no longer has; asked once at most.
    """
    rows = [look(run) for run in runs_under(root)]
    asked = {row.name: row.job_id for row in rows if row.job_id and row.state in _ASK}
    if not asked:
        return rows
    try:
        states = (queue or _queue_states)(sorted(set(asked.values())))
    except SlurmError:
        return [replace(row, note=NO_ANSWER) if row.name in asked else row for row in rows]
    return [_corrected(row, states.get(asked[row.name])) if row.name in asked else row for row in rows]


def look(run: RunDirectory) -> RunStatus:
    """The status of one run, by its own records; Slurm is not asked."""
    events, settings = Ledger(run.ledger).read(), settings_of(run)
    tries, progress = started_attempts(events), progress_file.read(run)
    state, trainer = state_of(run, events), settings["trainer"]
    newest = tries[-1] if tries else None
    current = progress if progress and newest and progress.attempt == newest.number else None
    saved = [event for attempt in tries for event in attempt.checkpoints]
    planned = (current and current.total_steps) or max(int(trainer.get("max_steps") or 0), 0)
    try:
        used: int | None = bytes_used(run.path)
    except OSError:
        used = None
    return RunStatus(
        name=run.path.name,
        path=str(run.path),
        state=state,
        attempts=len(tries),
        step=max(next((a.last_step for a in reversed(tries) if a.last_step), 0), current.step if current else 0),
        total_steps=planned or None,
        eta_s=eta_s(current) if current and state == "running" else None,
        checkpoint_step=saved[-1]["step"] if saved else None,
        checkpoint_age_s=max(time.time() - saved[-1]["time"], 0.0) if saved else None,
        bytes_used=used,
        budget_bytes=budget_of(settings),
        loss=progress.loss if progress and progress.loss is not None and math.isfinite(progress.loss) else None,
        best=best_metric(events, trainer),
        job_id=job_id_of(run, newest),
    )


_ASK: dict[State, State] = {
    "queued": "interrupted",
    "preempted": "interrupted",
    "stopped_unexpectedly": "stopped_unexpectedly",
}
"""States about which Slurm may know more than the ledger, and what they are when it has no such job any more."""


def _corrected(row: RunStatus, slurm_state: str | None) -> RunStatus:
    """The row, by what Slurm says of its job; None or a final state: the job is gone."""
    known: dict[str, State] = {
        "PENDING": "queued",
        "CONFIGURING": "running",
        "RUNNING": "running",
        "CANCELLED": "cancelled",
    }
    if slurm_state in known:
        return replace(row, state=known[slurm_state])
    if slurm_state in ("COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "REQUEUED", "RESIZING"):
        return row
    return replace(row, state=_ASK[row.state] if row.attempts else "stopped_unexpectedly")


def _queue_states(job_ids: list[str]) -> dict[str, str]:
    from outlast.slurm import queue_states

    return queue_states(job_ids)


def render(rows: list[RunStatus], console: Console) -> None:
    """Print the rows as a table, and what could not be found out under it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in ("run", "state", "step", "left", "attempts", "saved", "bytes", "loss / best"):
        narrow = 11 if header == "state" else None
        table.add_column(header, overflow="fold", no_wrap=header in ("step", "left", "attempts"), min_width=narrow)
    for row in rows:
        saved = "" if row.checkpoint_step is None else f"{row.checkpoint_step}"
        if row.checkpoint_age_s is not None:
            saved += f", {duration(row.checkpoint_age_s)} ago"
        score = "" if row.loss is None else f"{row.loss:.4g}"
        if row.best is not None:
            score = f"{row.best['name']} {row.best['value']:.4g} at {row.best['step']}"
        table.add_row(
            Text(row.name, style="bold"),
            Text(row.state.replace("_", " "), style=COLOURS[row.state]),
            f"{row.step}/{'?' if row.total_steps is None else row.total_steps}",
            "" if row.eta_s is None else duration(row.eta_s),
            str(row.attempts),
            saved,
            size(row.bytes_used, row.budget_bytes),
            score,
        )
    console.print(table if rows else "no runs here yet", highlight=False)
    for state in sorted({row.state for row in rows} & HINTS.keys()):
        console.print(HINTS[state], style="dim", highlight=False)
    for note in sorted({row.note for row in rows if row.note}):
        console.print(note, style="yellow")
