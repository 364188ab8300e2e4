"""The progress bar of a run in the foreground; plain lines where there is no terminal."""

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from outlast.rundir.progress import Progress

from ..runs.standing import seconds_left

PLAIN_INTERVAL_S = 10.0


def duration(seconds: float) -> str:
    """Write a length of time in at most two units: `8.4 s`, `3 min 20 s`, `4 d 03 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(used: int | None, budget: int | None = None) -> str:
    """Write bytes, with the budget that they count against: `1.3 GB of 10.0 GB`."""
    if used is None:
        return "?"
    return decimal(used) if budget is None else f"{decimal(used)} of {decimal(budget)}"


class ProgressBar:
    """Shows where an attempt is.

    On a terminal it is a bar with a line of details under it. Elsewhere (a pipe, a log file) it prints lines: one when
    attempt, phase or checkpoint change, otherwise at most one each `PLAIN_INTERVAL_S`.
    """

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._console = console
        self._live = _LiveBar(name, console) if console.is_terminal and not console.is_dumb_terminal else None
        self._printed = 0.0
        self._shown: tuple[object, ...] | None = None

    def __enter__(self) -> "ProgressBar":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, progress: Progress | None, note: str | None = None) -> None:
        """Show `progress` (None: nothing is known yet).

        Args:
            note: what is going on, in a few words; shown in place of the phase, until the next update.
        """
        if self._live is not None:
            self._live.show(progress, note)
            return
        change = (note,) if progress is None else (note, progress.attempt, progress.phase, progress.checkpoint_step)
        if change == self._shown and time.monotonic() - self._printed < PLAIN_INTERVAL_S:
            return
        if progress is not None or note:
            self._shown, self._printed = change, time.monotonic()
            self.note(" · ".join([self._name, *_headline(progress, note), *_details(progress)]))

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _LiveBar(RichProgress):
    """One bar, and under it the details, made anew at each refresh so that ages stay true."""

    def __init__(self, name: str, console: Console) -> None:
        self._progress: Progress | None = None
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False),
            TextColumn("{task.fields[headline]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[eta]}", markup=False),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self.add_task(name, total=None, headline="starting", eta="")

    def show(self, progress: Progress | None, note: str | None) -> None:
        self._progress = progress
        headline = " · ".join(_headline(progress, note)) or "starting"
        self.update(self._task, headline=headline)
        if progress is not None:
            self.update(self._task, total=progress.total_steps, completed=progress.step)

    def get_renderables(self) -> Iterable[RenderableType]:
        left = None if self._progress is None else seconds_left(self._progress)
        for task in self.tasks:
            task.fields["eta"] = "" if left is None else f"{duration(left)} left"
        yield self.make_tasks_table(self.tasks)
        details = _details(self._progress, eta=False)
        if details:
            yield Text("  " + " · ".join(details), style="dim", no_wrap=True, overflow="ellipsis")


def _headline(progress: Progress | None, note: str | None) -> list[str]:
    if progress is None:
        return [note] if note else []
    total = "?" if progress.total_steps is None else progress.total_steps
    return [f"attempt {progress.attempt}", note or progress.phase, f"step {progress.step}/{total}"]


def _details(progress: Progress | None, *, eta: bool = True) -> list[str]:
    if progress is None:
        return []
    details = []
    left = seconds_left(progress)
    if progress.loss is not None:
        details.append(f"loss {progress.loss:.4g}")
    if eta and left is not None:
        details.append(f"{duration(left)} left")
    if progress.checkpoint_step is not None:
        checkpoint = f"checkpoint at step {progress.checkpoint_step}"
        if progress.checkpoint_time is not None:
            checkpoint += f", {duration(max(time.time() - progress.checkpoint_time, 0.0))} ago"
        details.append(checkpoint)
    if progress.bytes_used or progress.budget_bytes is not None:
        peak = f", peak {size(progress.bytes_peak)}" if progress.bytes_peak else ""
        details.append(size(progress.bytes_used, progress.budget_bytes) + peak)
    return details
