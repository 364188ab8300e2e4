"""The table of `outlast status`: one line a run, a sweep's cells under a line that sums them up."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..runs.find import user_name
from ..runs.standing import RunStatus
from ..runs.state import State
from .progress import duration, size

HEADERS = ("run", "state", "metric", "step", "left", "saved", "attempts", "bytes (peak) of budget")
"""In the order of what is asked first: a terminal that is too narrow for all leaves the last ones out."""
REASON = 40
"""Characters of a reason in the table of a terminal, at most; what fails has its whole reason under it."""
WHOLE = 5
"""Reasons that are shown in full, at most."""
COLOURS: dict[State, str] = {
    State.NOT_STARTED: "dim",
    State.QUEUED: "cyan",
    State.RUNNING: "green",
    State.PREEMPTED: "yellow",
    State.INTERRUPTED: "yellow",
    State.STOPPED_UNEXPECTEDLY: "red",
    State.FAILED: "red",
    State.CANCELLED: "magenta",
    State.GAVE_UP: "red",
    State.FINISHED: "bold green",
}
HINTS: dict[State, str] = {
    State.PREEMPTED: "preempted: saved, waits for its requeue",
    State.INTERRUPTED: "interrupted: saved; `outlast resume`, or what started it, goes on",
    State.STOPPED_UNEXPECTEDLY: "stopped unexpectedly: `outlast resume`, or what started it, goes on",
    State.FAILED: "failed: `outlast logs RUN`, or the output of its script, says why",
    State.GAVE_UP: "gave up: restarts made no progress; `outlast logs RUN`, or the output of its script, says why",
}
"""What a state means for the reader, printed once under the table."""


def show(rows: list[RunStatus], console: Console | None = None) -> None:
    """Print the rows, and what could not be found out under them.

    On a terminal each row is one line. Elsewhere it is as long as it has to be: `less -S` can show it.
    """
    console = console or Console(highlight=False)
    table = Text("\n").join(lines(rows, console.width if console.is_terminal else None))
    if console.is_terminal:
        console.print(table, highlight=False, no_wrap=True, overflow="ellipsis")
    else:
        console.print(table, highlight=False, soft_wrap=True)
    for line in _below(rows):
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)


def watch(rows: Callable[[], list[RunStatus]], interval_s: float) -> None:
    """Show the rows anew every `interval_s` seconds, until Ctrl-C."""
    console = Console(highlight=False)
    try:
        if not console.is_terminal:
            while True:
                print(time.strftime("%H:%M:%S"))
                show(rows(), console)
                time.sleep(interval_s)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                now = rows()
                title = Text(f"{time.strftime('%H:%M:%S')}  {summary(now)}", style="bold")
                text = [title, *_below(now), *lines(now, console.width)]
                live.update(Text("\n", no_wrap=True, overflow="ellipsis").join(text), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def summary(rows: list[RunStatus], noun: str = "run") -> str:
    """How many are in which state: `12 runs: 3 running, 9 finished`."""
    count = Counter(row.state for row in rows)
    states = ", ".join(f"{count[state]} {state.replace('_', ' ')}" for state in State if count[state])
    return f"{len(rows)} {noun}{'s' * (len(rows) != 1)}" + (f": {states}" if states else "")


def lines(rows: list[RunStatus], width: int | None) -> Iterable[Text]:
    """The table, line by line.

    Args:
        width: columns of the terminal; None: there is no limit.
    """
    if not rows:
        return [Text("no runs here")]
    shared = len({row.owner for row in rows} | {user_name()}) > 1
    headers = (*HEADERS[:2], "owner", *HEADERS[2:]) if shared else HEADERS
    cells = {row.path: _cells(row, None if width is None else REASON, owner=shared) for row in rows}
    widths = [max(map(cell_len, column)) for column in zip(headers, *cells.values(), strict=True)]
    while width is not None and len(widths) > 3 and sum(widths) + 2 * (len(widths) - 1) > width:
        widths.pop()
    table = [Text(_padded(headers, widths), style="dim")]
    for sweep, group in groupby(rows, key=lambda row: row.sweep):
        members = list(group)
        if sweep is not None:
            table.append(Text.assemble((sweep, "bold"), f"  {summary(members, 'cell')}"))
        table += [Text(_padded(cells[row.path], widths), style=COLOURS[row.state]) for row in members]
    return table


def _padded(cells: Iterable[str], widths: list[int]) -> str:
    return "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=False)).rstrip()


def _cells(row: RunStatus, longest: int | None, *, owner: bool) -> list[str]:
    saved = "" if row.checkpoint_step is None else f"{row.checkpoint_step}"
    if row.checkpoint_age_s is not None:
        saved += f", {duration(row.checkpoint_age_s)} ago"
    peak = "" if row.bytes_peak is None else f" ({size(row.bytes_peak)})"
    budget = "" if row.budget_bytes is None else f" of {size(row.budget_bytes)}"
    score = "" if row.loss is None else f"loss {row.loss:.4g}"
    if row.best is not None:
        score = f"{row.best['name']} {row.best['value']:.4g} at {row.best['step']}"
    state = row.state.replace("_", " ")
    return [
        f"  {row.name.rpartition('/')[2]}" if row.sweep else row.name,
        f"{state} ({_shortened(row.reason, longest)})" if row.reason else state,
        *([row.owner] if owner else []),
        score,
        f"{row.step}/{'?' if row.total_steps is None else row.total_steps}",
        "" if row.eta_s is None else duration(row.eta_s),
        saved,
        str(row.attempts),
        f"{size(row.bytes_used)}{peak}{budget}",
    ]


def _shortened(text: str, longest: int | None) -> str:
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def _below(rows: list[RunStatus]) -> list[Text]:
    found = [Text(note, style="yellow") for note in sorted({row.note for row in rows if row.note})]
    states = {row.state for row in rows}
    long = [
        row
        for row in rows
        if row.state in (State.FAILED, State.STOPPED_UNEXPECTEDLY) and len(row.reason or "") > REASON
    ]
    found += [Text(f"{row.name}: {row.reason}", style="red") for row in long[:WHOLE]]
    return found + [Text(HINTS[state], style="dim") for state in State if state in HINTS and state in states]
