"""`progress.json` says where a run is now: rank 0 writes it while training; the progress bar and `status` read it.

It is a convenience, not a record: the ledger holds what happened. So it is replaced as a whole but not flushed to
disk, and at most twice a second.
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, fields
from typing import Literal

from outlast import clock
from outlast.files import read_json, to_json, write_atomically

from .directory import RunDirectory
from .losses import Losses

Phase = Literal["starting", "converting", "training", "evaluating", "saving", "done"]

INTERVAL_S = 0.5
NUMBERS = (int, float, type(None))


@dataclass(kw_only=True)
class Progress:
    """The state of a running attempt at one moment. Times are Unix seconds, sizes bytes."""

    attempt: int = 0
    phase: Phase = "starting"
    step: int = 0
    total_steps: int | None = None
    seconds_per_step: float | None = None
    """Mean over the steps of this attempt."""
    loss: float | None = None
    epoch: float | None = None
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    bytes_used: int = 0
    bytes_peak: int = 0
    """The most that was seen in use, over all attempts."""
    budget_bytes: int | None = None
    time: float = 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds of training left, or None before that can be known."""
        if self.total_steps is None or self.seconds_per_step is None:
            return None
        return max(self.total_steps - self.step, 0) * self.seconds_per_step


class ProgressWriter:
    """Keeps one :class:`Progress` and the losses; writes them out, not more often than every `INTERVAL_S`."""

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.progress
        self._written = 0.0
        self._first: tuple[int, float] | None = None
        self.now, self.losses = Progress(), Losses(run)

    def update(self, *, force: bool = False, **values: object) -> None:
        """Set fields of :class:`Progress`; write if it is time to, or if `force`."""
        for name, value in values.items():
            setattr(self.now, name, value)
        if isinstance(loss := values.get("loss"), float | int):
            self.losses.add(self.now.step, float(loss))
        moment = clock.now()
        if "step" in values:
            if self._first is None:
                self._first = (self.now.step, moment)
            elif self.now.step > self._first[0]:
                self.now.seconds_per_step = (moment - self._first[1]) / (self.now.step - self._first[0])
        if force or moment - self._written >= INTERVAL_S:
            self._written, self.now.time = moment, time.time()  # which readers compare with theirs
            with contextlib.suppress(OSError):  # a full disk must not end the training that it reports on
                self.losses.write(force=force)
            with contextlib.suppress(OSError):
                write_atomically(self._path, to_json(asdict(self.now)), durable=False)

    def go_on_from(self, step: int) -> None:
        """Forget the losses of steps after `step`, which are made again."""
        self.losses.go_on_from(step)


def read(run: RunDirectory) -> Progress | None:
    """The last progress written, or None if there is none that can be read."""
    values = read_json(run.progress)
    if not isinstance(values, dict):
        return None
    numbers = {f.name: values[f.name] for f in fields(Progress) if f.name in values and f.name != "phase"}
    if not all(isinstance(value, NUMBERS) for value in numbers.values()):
        return None
    found = Progress(**numbers, phase=values.get("phase", "starting"))
    if found.seconds_per_step is not None and not 0.0 <= found.seconds_per_step < math.inf:
        found.seconds_per_step = None  # a clock was set
    return found
