"""Keeps the training losses of a run, over all attempts, in `progress.json`: a few hundred points at most.

They are what `outlast report` draws, whatever checkpoints and logs are still there. Each step counts once: an attempt
forgets the losses after the step that it goes on from. What is kept is bounded: the longer the run, the farther apart.
"""

import math
from typing import Any

Point = tuple[int, float | None]
"""A step and the loss logged there; None: it was no finite number."""

MOST = 512
"""About how many points are kept, up to twice as many: some 20 kB."""


def add(points: list[Point], step: int, loss: float) -> None:
    """Add the loss of a step, unless the last point is very near. The longer a run, the farther apart they are."""
    if points and step - points[-1][0] <= (points[-1][0] - points[0][0]) // MOST:
        return
    points.append((step, float(f"{loss:.5g}") if math.isfinite(loss) else None))
    if len(points) > 2 * MOST:
        del points[1::2]


def up_to(step: int, points: list[Point]) -> list[Point]:
    """The points of the steps up to `step`."""
    return [point for point in points if point[0] <= step]


def points_of(progress: Any) -> list[Point]:
    """The points in what was read from `progress.json`; what is damaged is left out."""
    found = progress.get("losses") if isinstance(progress, dict) else None
    return [
        (point[0], point[1])
        for point in (found if isinstance(found, list) else [])
        if isinstance(point, list) and len(point) == 2 and isinstance(point[0], int)
        if point[1] is None or isinstance(point[1], float | int)
    ]
