"""Waiting for runs to come to their end, and what came of them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from outlast.errors import Exit
from outlast.rundir.directory import RunDirectory

from ..commands.status import RunStatus, collect
from ..display.progress import duration
from ..display.status_table import COLOURS, summary
from ..runs.queue import ACTIVE
from ..runs.runs import State

ENDS: tuple[State, ...] = ("finished", "failed", "cancelled", "gave_up", "interrupted", "stopped_unexpectedly")
FIRST: tuple[State, ...] = ("running", "preempted", "failed", "gave_up", "stopped_unexpectedly", "interrupted")
"""What is shown first where the terminal is too small for all."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one run, or of one cell of a sweep."""

    name: str
    overrides: list[str]
    """What the cell does not share with the others; empty for a single run."""
    state: State
    step: int
    metric: dict[str, Any] | None
    """The best evaluation (`name`, `value`, `step`); where nothing was evaluated, the last training loss."""
    path: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def result(row: RunStatus, overrides: Sequence[str] = ()) -> Result:
    """The result of a run, by its status."""
    loss = None if row.loss is None else {"name": "loss", "value": row.loss, "step": row.step}
    name = row.name.rpartition("/")[2]
    metric = row.best or loss
    return Result(name=name, overrides=list(overrides), state=row.state, step=row.step, metric=metric, path=row.path)


def exit_code(results: Sequence[Result]) -> Exit:
    """Of a command that waited: the worst of what came of its runs."""
    unfinished = {one.state for one in results} - {"finished"}
    if not unfinished:
        return Exit.DONE
    if unfinished <= {"interrupted", "not_started"}:
        return Exit.RESUME_ME
    return Exit.GAVE_UP if unfinished <= {"interrupted", "not_started", "gave_up"} else Exit.FAILED


def wait(runs: Sequence[RunDirectory], console: Console) -> list[RunStatus]:
    """Show the runs until none of them will go on by itself.

    Returns:
        Their status, in the order of `runs`.

    Raises:
        KeyboardInterrupt: the user stopped waiting; that changes nothing for the runs.
    """
    began, over_before = time.monotonic(), False
    with LiveTable(console) as table:
        while True:
            looked = time.monotonic()
            rows = collect(runs)
            table.show(rows)
            over = all(_is_over(row) for row in rows)
            if over and (over_before or all(row.state == "finished" for row in rows)):
                return rows
            over_before = over  # between the end of an attempt and the next one's job, there may be a gap
            time.sleep(pause_s(looked, min(1 + (looked - began) / 30, 10)))  # squeue is asked each time


def pause_s(looked: float, least_s: float) -> float:
    """Seconds until the next look, such that looking at very many runs takes a tenth of the time at most.

    Args:
        looked: when the look that has just ended began, by the monotonic clock.
    """
    return max(least_s, 9 * (time.monotonic() - looked))


def _is_over(row: RunStatus) -> bool:
    if row.state == "finished":
        return True
    return row.state in ENDS and row.note is None and row.slurm_state not in ACTIVE


class LiveTable:
    """A table of runs that is shown anew in place; off a terminal, a line whenever a run's state changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._states: dict[str, str] = {}

    def __enter__(self) -> "LiveTable":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: list[RunStatus]) -> None:
        if self._live is not None:
            self._live.update(Group(*self._lines(rows)), refresh=True)
            return
        if not self._states:
            self.note(summary(rows, "cell" if len(rows) > 1 else "run"))
            self._states = {row.path: row.state for row in rows if row.state in ("queued", "finished", "not_started")}
        for row in rows:
            if self._states.get(row.path) != row.state:
                self._states[row.path] = row.state
                self.note(f"{row.name}: {row.state.replace('_', ' ')}{_detail(row)}")

    def note(self, text: str) -> None:
        """Print a line that stays, above the table."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _lines(self, rows: list[RunStatus]) -> list[RenderableType]:
        room = max(self._console.height - 4, 3)
        shown = rows if len(rows) <= room else sorted(rows, key=_place)[:room]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for header in ("cell", "state", "step", "left", "attempts", "metric"):
            table.add_column(header, overflow="fold")
        for row in shown:
            table.add_row(
                Text(row.name.rpartition("/")[2], style="bold"),
                Text(row.state.replace("_", " "), style=COLOURS[row.state]),
                f"{row.step}/{row.total_steps or '?'}",
                "" if row.eta_s is None else duration(row.eta_s),
                str(row.attempts),
                metric_text(result(row)),
            )
        notes = [Text(note, style="yellow") for note in sorted({row.note for row in rows if row.note})]
        return [Text(summary(rows, "cell" if len(rows) > 1 else "run"), style="bold"), *notes, table]


def _place(row: RunStatus) -> int:
    return FIRST.index(row.state) if row.state in FIRST else len(FIRST)


def metric_text(one: Result) -> str:
    """As a table shows it: `eval_loss 1.23 at 40`."""
    return "" if one.metric is None else f"{one.metric['name']} {one.metric['value']:.4g} at {one.metric['step']}"


def _detail(row: RunStatus) -> str:
    if row.state in ("queued", "not_started"):
        return ""
    text = metric_text(result(row))
    return f", step {row.step}" + (f", {text}" if text else "") + (f" ({row.reason})" if row.reason else "")
