"""Waiting for runs to come to their end."""

import time
from collections.abc import Sequence

from rich.console import Console

from outlast.rundir.directory import RunDirectory

from ..display.live_table import LiveTable
from ..runs.queue import ACTIVE
from ..runs.standing import RunStatus, collect
from ..runs.state import State

ENDS: tuple[State, ...] = (
    State.FINISHED,
    State.FAILED,
    State.CANCELLED,
    State.GAVE_UP,
    State.INTERRUPTED,
    State.STOPPED_UNEXPECTEDLY,
)


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
            if over and (over_before or all(row.state == State.FINISHED for row in rows)):
                return rows
            over_before = over  # between the end of an attempt and the next one's job, there may be a gap
            time.sleep(pause_s(looked, min(1 + (looked - began) / 30, 10)))  # squeue is asked each time


def pause_s(looked: float, least_s: float) -> float:
    """Choose the pause before the next look, so that looking takes at most a tenth of the time.

    Args:
        looked: when the look that has just ended began, by the monotonic clock.
    """
    return max(least_s, 9 * (time.monotonic() - looked))


def _is_over(row: RunStatus) -> bool:
    if row.state == State.FINISHED:
        return True
    return row.state in ENDS and row.note is None and row.slurm_state not in ACTIVE
