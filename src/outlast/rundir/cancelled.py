"""Tells whether a user has cancelled a run: `cancelled.json`, which `outlast cancel` writes."""

from pathlib import Path

from outlast.files import read_json


def cancelled_after(run: Path, moment: float) -> bool:
    """Whether a user has cancelled the run in directory `run` since `moment` (Unix seconds)."""
    try:
        return float((read_json(run / "cancelled.json") or {})["time"]) > moment
    except (KeyError, TypeError, ValueError):
        return False


class CancelMark:
    """Notices that a user cancels the run in directory `run` from here on, whatever the clocks say."""

    def __init__(self, run: Path) -> None:
        self._run, self._before = run, read_json(run / "cancelled.json")

    @property
    def is_set(self) -> bool:
        """Whether the mark is there now and was not there, or was another, before."""
        mark = read_json(self._run / "cancelled.json")
        return mark is not None and mark != self._before
