"""A table of runs that is shown anew in place, while a command waits for them."""

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..runs.results import metric_text, result
from ..runs.standing import RunStatus
from ..runs.state import State
from .progress import duration
from .status_table import COLOURS, summary

FIRST: tuple[State, ...] = (
    State.RUNNING,
    State.PREEMPTED,
    State.FAILED,
    State.GAVE_UP,
    State.STOPPED_UNEXPECTEDLY,
    State.INTERRUPTED,
)
"""What is shown first where the terminal is too small for all."""


class LiveTable:
    """Shows a table of runs and renews it in place; off a terminal, prints a line when a state changes."""

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
            self._states = {
                row.path: row.state for row in rows if row.state in (State.QUEUED, State.FINISHED, State.NOT_STARTED)
            }
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


def _detail(row: RunStatus) -> str:
    if row.state in (State.QUEUED, State.NOT_STARTED):
        return ""
    text = metric_text(result(row))
    return f", step {row.step}" + (f", {text}" if text else "") + (f" ({row.reason})" if row.reason else "")
