"""Decides when to save: every N steps, every T seconds, or as often as pays (`checkpoint.every: auto`, the default).

A save costs C seconds of stall; a failure without notice costs what was trained since the last save, half an interval
on average. With M seconds from one such failure to the next, saving every W seconds loses about C/W + W/(2M) of the
time. That is least at W = sqrt(2CM): J. W. Young, "A first order approximation to the optimum checkpoint interval",
CACM 17 (1974). :func:`optimum` is the higher-order formula: J. T. Daly, "A higher order estimate of the optimum
checkpoint interval for restart dumps", FGCS 22 (2006).

The optimum is flat: twice or half the best interval costs a quarter more than the least. So a rough C and M will do.
"""

import math
from collections import deque
from statistics import median

from outlast.config.checkpoint import CheckpointSection
from outlast.rundir.attempts import Attempt, attempts
from outlast.rundir.ledger import KILLED, Event

LOWER_S = 60.0
"""The shortest interval: a minute of steps is quickly repeated, and each save drives an older one out.
The first save comes after this time, so that the cost of a save is known early."""
LARGEST_SHARE = 0.05
"""The largest share of the time that saving may take. C is measured, but M rests on few failures: a streak of them must
not turn the run into one that mostly saves."""
UPPER_S = 3600.0
"""The longest interval, whatever a save costs: at most an hour of steps is ever at risk. M may be far too long, since a
preemption is a failure too where its notice does not help (no grace time, or a save that takes longer than it)."""
RECENT_SAVES = 9
"""The cost is that of this many last saves, so that it follows a change of file system or machine."""
NOTICEABLE = 0.2


def optimum(cost_s: float, mtbf_s: float) -> float:
    """The best time from the end of one save to the start of the next, in seconds (Daly 2006).

    With x = C/(2M): W = sqrt(2CM) (1 + sqrt(x)/3 + x/9) - C for C < 2M, else W = M. Its first term is Young's.
    """
    cost_s = max(cost_s, 0.0)
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    x = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - cost_s


def interval(cost_s: float | None, mtbf_s: float) -> float:
    """The optimum within its bounds, in seconds; the lower bound while the cost of a save is unknown."""
    if cost_s is None:
        return LOWER_S
    return min(max(optimum(cost_s, mtbf_s), _lower(cost_s)), UPPER_S)


def explain(seconds: float, cost_s: float | None, mtbf_s: float) -> str:
    """Explain an interval of `auto` in one sentence."""
    failure = f"a failure without notice is expected every {_words(mtbf_s)}"
    if cost_s is None:
        bounds = f"at least every {_words(UPPER_S)}"
        return f"first after {_words(seconds)}, then by what that save costs, {bounds}; {failure}"
    best, why = optimum(cost_s, mtbf_s), ""
    if best < seconds:
        why = f"; {_words(best)} would lose least, but no interval is below {_words(LOWER_S)}"
        if seconds > LOWER_S:
            why = f"; {_words(best)} would lose least, but saving may take {LARGEST_SHARE:.0%} of the time at most"
    elif best > seconds:
        why = f"; {_words(best)} would lose least, but no more than {_words(UPPER_S)} of steps is ever at risk"
    return f"every {_words(seconds)}: a save takes {_words(cost_s)}, and {failure}{why}"


def failures(tries: list[Attempt]) -> int:
    """Count the attempts that ended without saving their last step, preemptions whose notice was missed included.

    Cancelled attempts don't count, nor those that failed before they had trained: no interval could have helped.
    """
    count = newest = 0
    for attempt in tries:
        newest = attempt.saved_step if attempt.resumed else max(attempt.saved_step, newest)
        ended = attempt.ended is not None and attempt.ended["cause"] not in ("finished", "cancelled")
        count += ended and attempt.last_step > newest
    return count


def trained_s(events: list[Event]) -> float:
    """Seconds of training in all attempts so far; a killed attempt counts up to its last ledger line."""
    begun: dict[int, float] = {}
    last: dict[int, float] = {}
    for event in events:
        number = event["attempt"]
        if event["event"] == "resumed":
            begun[number] = event["time"]
        elif event.get("detail") == KILLED:
            continue  # the next attempt wrote this line
        last[number] = event["time"]
        begun.setdefault(number, event["time"])
    return sum(max(last[number] - begun[number], 0.0) for number in last)


class SaveInterval:
    """Decides, on rank 0, whether a periodic save is due.

    Args:
        events: the run's ledger, for the costs and failures of earlier attempts. Read it after this attempt has noted
            how the previous one ended.
        now: when training begins, in seconds; all times given to one instance are from the same clock, any clock.
    """

    def __init__(self, section: CheckpointSection, events: list[Event], now: float) -> None:
        self._section = section
        self._began = self._last = now
        self._tried = (0, -math.inf)
        self._failures, self._trained_s = failures(attempts(events)), trained_s(events)
        self._costs: deque[float] = deque(maxlen=RECENT_SAVES)
        self._told: float | None = None
        for event in events:
            if event["event"] == "checkpoint" and event["kind"] != "final":
                self._costs.append(event["stall_s"])
            elif event["event"] == "interval":
                self._told = event["seconds"]
        self.mtbf_s = self._estimate(now)
        """Seconds expected between failures without notice, as of the last save."""

    @property
    def mode(self) -> str:
        """`steps`, `time` or `auto`."""
        if self._section.steps is not None:
            return "steps"
        return "auto" if self._section.seconds is None else "time"

    @property
    def cost_s(self) -> float | None:
        """The median stall of recent saves, in seconds; None before the first. One write that hung on a busy file
        system would stretch a mean for a long time; a median that is off by a factor of two still costs little."""
        return median(self._costs) if self._costs else None

    @property
    def seconds(self) -> float | None:
        """The current interval, in seconds; None if steps decide."""
        return interval(self.cost_s, self.mtbf_s) if self.mode == "auto" else self._section.seconds

    @property
    def explanation(self) -> str:
        """Explain in one sentence when saves are made, and why."""
        text = f"every {self._section.steps} steps, as configured"
        if self.seconds is not None:
            text = f"every {_words(self.seconds)}, as configured"
        if self.seconds is not None and self.mode == "auto":
            text = explain(self.seconds, self.cost_s, self.mtbf_s)
        milestone = self._section.milestone_every
        return text if milestone is None else f"{text}; and a milestone every {milestone} steps"

    def due_by_step(self, step: int) -> bool:
        """Whether the number of `step` alone makes a save due: as configured, or as a milestone."""
        intervals = (self._section.steps, self._section.milestone_every)
        return any(each is not None and step % each == 0 for each in intervals)

    def due(self, step: int, now: float) -> bool:
        """Whether a periodic save is due after `step`.

        Where time decides, a due save that could not be made (the disk is full) is due again after the lower bound,
        not at each step.
        """
        seconds = self.seconds
        if self.due_by_step(step) or seconds is None:
            return self.due_by_step(step)
        if now - self._last < seconds:
            return False
        tried_step, tried = self._tried
        if step != tried_step and now - tried < min(_lower(self.cost_s), seconds):
            return False
        self._tried = step, now
        return True

    def saved(self, step: int, cost_s: float, now: float) -> None:
        """Note that `step` was saved, with a stall of `cost_s` seconds; the interval starts anew."""
        self._costs.append(cost_s)
        self._last = now
        self.mtbf_s = self._estimate(now)

    def changed(self) -> dict[str, float] | None:
        """Fields of the ledger's `interval` event if the interval of `auto` has changed, else None.

        Changes of up to a fifth since the last event don't count. Call this once after each save.
        """
        seconds, cost_s = self.seconds, self.cost_s
        if self.mode != "auto" or seconds is None or cost_s is None:
            return None
        if self._told is not None and abs(seconds / self._told - 1) <= NOTICEABLE:
            return None
        self._told = seconds
        return {"seconds": seconds, "cost_s": cost_s, "mtbf_s": self.mtbf_s}

    def _estimate(self, now: float) -> float:
        """Estimate the seconds from one failure without notice to the next.

        (configured + trained) / (1 + failures): the configured time weighs as much as one failure seen in that time,
        and less and less as the run sees its own. For failures at a constant rate this is one over the rate's posterior
        mean, if the rate's prior is a Gamma distribution of shape 1 with the configured mean.
        """
        trained = self._trained_s + max(now - self._began, 0.0)
        return (self._section.mtbf_hours * 3600 + trained) / (1 + self._failures)


def _lower(cost_s: float | None) -> float:
    return max(LOWER_S, (cost_s or 0.0) / LARGEST_SHARE)


def _words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
