"""Trackio: one run in a database of the run directory."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .gate import Logs, Point, Start, logged_points, once, tracking_directory
from .identity import Identity
from .rows import STEP, SUMMARY, named

if TYPE_CHECKING:
    from transformers.integrations import TrackioCallback

    from outlast.attempt.attempt import RankAttempt


class Trackio:
    """Keeps one run of Trackio, found by its name.

    Nothing is taken out of its database: what is there already is not logged again.
    """

    name = "trackio"

    def __init__(self, run: "RankAttempt", callback: "TrackioCallback") -> None:
        self._run, self._callback = run, callback

    def begin(self, start: Start, args: Any, state: Any, history: list[Logs]) -> Callable[[Point], bool]:
        """Open the run, new or not."""
        from trackio.sqlite_storage import SQLiteStorage

        who = Identity.of(self._run)
        place = tracking_directory(self._run, self.name)
        if "TRACKIO_DIR" not in os.environ:
            _keep_in(place)
        remote = args.trackio_space_id or os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        args.run_name = args.run_name or f"{who.name}-{who.id[:6]}"
        start(args)
        if remote:
            self._run.say("WARNING: Trackio logs to a server: steps that are repeated after a kill are there twice")
            return once(logged_points(history, self.named))
        there: Counter[Point] = Counter()
        for row in SQLiteStorage.get_logs(args.project, args.run_name):
            if STEP in row:
                there.update((key, int(row[STEP])) for key in row)
        known = once(there)
        return lambda point: point[0] in SUMMARY or known(point)

    def named(self, key: str) -> str:
        """The name of a value in a row."""
        return named(key)

    def end(self) -> None:
        """Do nothing: the callback has closed the run."""


def _keep_in(place: Any) -> None:
    """Have Trackio keep its files in `place`; it reads the variable for that once, when it is imported."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            setattr(module, "TRACKIO_DIR", place)  # noqa: B010
