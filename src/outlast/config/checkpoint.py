"""When a run saves, and what a resume may differ in."""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from .section import Number, Passes, Section

EVERY = "auto, a number of steps (500), or a time (90s, 30min, 2h)"


def _interval(every: int | str) -> tuple[int | None, float | None]:
    """What `every` means: (steps, None), (None, seconds), or (None, None) for `auto`.

    Raises:
        ValueError: it means nothing.
    """
    if every == "auto":
        return None, None
    if isinstance(every, int) and every > 0:
        return every, None
    time = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", str(every))
    seconds = float(time[1]) * {"s": 1, "min": 60, "h": 3600}[time[2]] if time else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(EVERY)
    return None, seconds


@dataclass(kw_only=True)
class CheckpointSection(Section):
    """When to save, what to keep, and what a resume may differ in."""

    gone = dict.fromkeys(("every_steps", "every_minutes"), f"it is checkpoint.every now; valid: {EVERY}")

    every: Annotated[int | str, Passes(_interval, EVERY)] = "auto"
    """When to save: every so many optimizer steps, every so often, or `auto`, from a save's cost and `mtbf_hours`."""
    milestone_every: Annotated[int, Number("steps", gt=0)] | None = None
    """Optimizer steps between milestones: checkpoints that are made whatever `every` says, and kept; null: none."""
    mtbf_hours: Annotated[float, Number("hours", gt=0)] = 24.0
    """Hours expected between failures of the run that come *without* notice; preemptions with notice don't count."""
    allow: list[Literal["dataset", "seed", "global_batch", "trainable", "config", "state", "restart"]] = field(
        default_factory=list
    )
    """Differences between a checkpoint and the run that a resume accepts. `state`: something else was loaded than was
    saved, or the base model is another; `restart`: begin at step 0 if no checkpoint verifies."""

    @property
    def steps(self) -> int | None:
        """Optimizer steps between periodic checkpoints; None if time decides (`seconds`, or the rule of `auto`)."""
        return _interval(self.every)[0]

    @property
    def seconds(self) -> float | None:
        """Seconds between periodic checkpoints, as configured; None if steps decide, or the rule of `auto`."""
        return _interval(self.every)[1]
