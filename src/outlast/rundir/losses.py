"""Keeps the training losses of a run, over all attempts, in `losses.json`: some hundreds of points.

They are what `outlast report` draws, whatever checkpoints and logs are still there. Each step counts once: an attempt
forgets the losses after the step that it goes on from. What is kept is bounded: the longer the run, the farther apart.

The file is not `progress.json`, since to write it takes milliseconds: too long for twice a second in a training loop.
"""

import math
import sys
from typing import Any

from outlast import clock
from outlast.files import read_json, to_json, write_atomically

from .directory import RunDirectory

Point = tuple[int, float | None]
"""A step and the loss logged there; None: it was no finite number."""

MOST = 512
"""About how many points are kept, up to twice as many: some 20 kB."""
INTERVAL_S = 10.0


class Losses:
    """The points of one run, with those of its earlier attempts, and the file that they are written to."""

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.losses
        self.points = read(run)
        self._changed = bool(self.points)  # an earlier version's are not in this file yet
        self._written = 0.0

    def add(self, step: int, loss: float) -> None:
        """Add the loss of a step, unless the last point is very near. The longer a run, the farther apart they are."""
        points = self.points
        if points and step - points[-1][0] <= (points[-1][0] - points[0][0]) // MOST:
            return
        points.append((step, float(f"{loss:.5g}") if math.isfinite(loss) else None))
        if len(points) > 2 * MOST:
            del points[1::2]
        self._changed = True

    def go_on_from(self, step: int) -> None:
        """Forget the losses of steps after `step`, which are made again."""
        kept = [point for point in self.points if point[0] <= step]
        self._changed |= len(kept) < len(self.points)
        self.points = kept

    def write(self, *, force: bool = False) -> None:
        """Write what has changed, if it is time to, or if `force`, as at each save.

        Raises:
            OSError: it can't be written.
        """
        moment = clock.now()
        if self._changed and (force or moment - self._written >= INTERVAL_S):
            self._written = moment
            write_atomically(self._path, to_json({"losses": self.points}), durable=False)
            self._changed = False


def read(run: RunDirectory) -> list[Point]:
    """The points of a run; what is damaged is left out."""
    found = read_json(run.losses)
    return _points_of(read_json(run.progress) if found is None else found)  # where they were in an earlier version


def _points_of(values: Any) -> list[Point]:
    found = values.get("losses") if isinstance(values, dict) else None
    return [
        (point[0], point[1])
        for point in (found if isinstance(found, list) else [])
        if isinstance(point, list) and len(point) == 2 and isinstance(point[0], int) and _is_finite(point[0])
        if point[1] is None or _is_finite(point[1])
    ]


def _is_finite(value: Any) -> bool:
    """Whether it is a number that can be drawn: no infinity, and no integer beyond all floating-point numbers."""
    return isinstance(value, float | int) and abs(value) <= sys.float_info.max
