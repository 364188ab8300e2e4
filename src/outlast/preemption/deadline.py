"""Compares the notice that the cluster gives with the measured time of steps and saves.

What a stop takes is counted from the moment at which it is asked for: the time until the ranks come to the next point
where they can act (the end of a micro-batch, of an evaluation's batch), a save, and the requeue. Rank 0 keeps the
account for all; the ranks of a run do the same work.
"""

import math
import time
from collections import deque
from typing import Any, Literal

from outlast import clock
from outlast.checkpoint.interval import interval
from outlast.rundir.ledger import Event
from outlast.slurm.view import Notice

from .cause import StopCause
from .stopped import note_stops, was_stopped_since

Work = Literal["step", "evaluation"]
"""The work between two points at which a run can act: a step's micro-batch, or an evaluation's batch."""

RECENT = 9
"""How many of the last measurements count: a run changes its pace, and so does a file system."""
SLACK = 1.5
"""How much longer than the longest of these the next one may take."""
MARGIN_S = 5.0
"""Seconds kept free before the kill: for the requeue (two Slurm commands) and for the ranks to leave."""
ASSUMED_BYTES_S = 0.2e9
"""Bytes a second assumed for a save before one was measured: what a busy network file system gives."""
EXAMPLE_MTBF_S = 4 * 3600.0
"""Seconds between preemptions that a warning takes as its example."""


class Planner:
    """Measures the steps, evaluations and saves of one attempt, and says what still fits before the kill.

    Args:
        lead_s: `preemption.lead_s`.
        checkpoint_bytes: what a checkpoint is expected to take; None: not known.
    """

    def __init__(self, lead_s: float, checkpoint_bytes: int | None = None) -> None:
        self._asked_lead_s, self._checkpoint_bytes = lead_s, checkpoint_bytes
        self._stretches: dict[Work, deque[float]] = {"step": deque(maxlen=RECENT), "evaluation": deque(maxlen=RECENT)}
        self._saves: deque[float] = deque(maxlen=RECENT)
        self._since: float | None = None
        self._warned = False

    def begin(self, events: list[Event]) -> None:
        """Start measuring: training begins. In the main thread.

        Args:
            events: the run's ledger: what saves have cost in earlier attempts.
        """
        note_stops()
        self.mark()
        self._saves.extend(e["stall_s"] for e in events if e["event"] == "checkpoint" and e["kind"] != "final")

    # Measuring --------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """Begin a stretch of work here; what came before is not part of it."""
        self._since = time.monotonic()

    def reached(self, work: Work) -> None:
        """End a stretch of this work at a point where the ranks can act, and begin the next."""
        if self._since is not None and not was_stopped_since(self._since):
            self._stretches[work].append(time.monotonic() - self._since)
        self.mark()

    def saved(self, seconds: float) -> None:
        """Note that a save has stalled the run for this long."""
        if not was_stopped_since(time.monotonic() - seconds):
            self._saves.append(seconds)
        self.mark()

    def each_s(self, work: Work) -> float | None:
        """Seconds of one stretch: the longest of the last few; None before the first."""
        return max(self._stretches[work], default=None)

    @property
    def save_s(self) -> float | None:
        """Seconds of a save: the longest of the last few, earlier attempts included.

        Before the first it is estimated from the expected size; None if that is not known either.
        """
        if not self._saves and self._checkpoint_bytes is not None:
            return self._checkpoint_bytes / ASSUMED_BYTES_S
        return max(self._saves, default=None)

    @property
    def reaction_s(self) -> float:
        """Seconds from a signal until the ranks can act, in the worst case."""
        return max((each for work in self._stretches if (each := self.each_s(work)) is not None), default=0.0)

    @property
    def needed_s(self) -> float | None:
        """Seconds from a signal until the processes are gone; None if nothing is known of a save."""
        return None if self.save_s is None else SLACK * (self.reaction_s + self.save_s) + MARGIN_S

    # Deciding ---------------------------------------------------------------------------------------------------

    @property
    def lead_s(self) -> float:
        """Seconds before the time limit at which to stop untold: the configured time, or more if that is too short."""
        return max(self._asked_lead_s, self.needed_s or 0.0)

    def time_for(self, seconds: float | None, deadline: float | None, now: float) -> bool | None:
        """Whether work of `seconds` can still be finished before the save that follows.

        Args:
            deadline: when the job will be killed, Unix seconds; None if that is not known.
            now: Unix seconds.

        Returns:
            None if it can't be known: no deadline, no `seconds`, or no save has been measured and the rest would fit.
        """
        if deadline is None or seconds is None:
            return None
        if now + SLACK * (seconds + (self.save_s or 0.0)) + MARGIN_S > deadline:
            return False
        return None if self.save_s is None else True

    def shortfall(self, notice: Notice | None) -> tuple[str, dict[str, Any]] | None:
        """Warn, once, if a stop needs longer than the notice that this cluster gives.

        Args:
            notice: what Slurm gives; None if it could not be asked.

        Returns:
            A sentence, and the fields of the ledger's `notice_short`; None if all is well, or has been said.
        """
        needed, save = self.needed_s, self.save_s
        if needed is None or save is None or self._warned:
            return None
        given = notice.preemption_s if notice else None
        preempted = given is not None and needed > given
        if not preempted and needed <= self._asked_lead_s:
            return None
        self._warned = True
        how = "" if self._saves else f" (by its size, at {ASSUMED_BYTES_S / 1e9:g} GB a second)"
        said = [
            f"to save and leave takes up to {needed:.0f} s: {_rounded(self.reaction_s)} s until the ranks can act and "
            f"{_rounded(save)} s to save{how}, {SLACK:g} times that to be safe, {MARGIN_S:g} s to leave"
        ]
        if preempted and notice is not None:
            every, hours = interval(save, EXAMPLE_MTBF_S), EXAMPLE_MTBF_S / 3600
            said.append(
                f"a preemption gives {given:.0f} s ({notice.source}) and may cost what was trained since the last "
                f"checkpoint: with one every {hours:.0f} hours, checkpoint.every={every / 60:.0f}min loses least"
            )
        if needed > self._asked_lead_s:
            said.append(
                f"preemption.lead_s is {self._asked_lead_s:g}, so the run leaves before Slurm's signal, by its own "
                f"clock: preemption.lead_s={math.ceil(needed / 10) * 10} would bring the signal in time"
            )
        fields = {"needed_s": needed, "save_s": save, "reaction_s": self.reaction_s, "notice_s": given}
        return "; ".join(said), fields | {"lead_s": self._asked_lead_s}


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


class TimeLimit:
    """The job's own end, before which a run leaves without being told. Only rank 0 knows it.

    Args:
        cause: knows when that is, as soon as Slurm has said it.
        planner: knows how long before it the run must stop.
        started: when this attempt began, Unix seconds.
    """

    def __init__(self, cause: StopCause, planner: Planner, started: float) -> None:
        self._cause, self._planner, self._started = cause, planner, started

    def is_near(self) -> bool:
        """Whether it is time to stop; Slurm is asked once more before the answer is yes."""
        at = self._stop_at()
        return at is not None and clock.now() >= at and not self._was_raised()

    def _was_raised(self) -> bool:
        end = self._cause.end_time
        assert end is not None
        return self._cause.limit_was_raised(end) and clock.now() < (self._stop_at() or 0.0)

    def _stop_at(self) -> float | None:
        end = self._cause.end_time
        if end is None:
            return None
        longest_s = max(end - self._started, 0.0) / 2  # a job shorter than its lead time must still get to train
        return end - min(self._planner.lead_s, longest_s)
