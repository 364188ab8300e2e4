"""Reads the ledger back: one value for each attempt, and the attempt that a process belongs to."""

from dataclasses import dataclass, field

from .directory import RunDirectory
from .ledger import Event, Ledger
from .progress import Progress, read

ATTEMPT_ENV = "OUTLAST_ATTEMPT"
"""Tells a rank the number of its attempt."""
TIDYING = ("deleted", "delete_failed")
"""Events that may be long after an attempt: of what is deleted of a run that has ended."""


@dataclass
class Attempt:
    """What the ledger says about one attempt."""

    number: int
    started: Event | None = None
    ended: Event | None = None
    resumed: Event | None = None
    signals: list[Event] = field(default_factory=list)
    checkpoints: list[Event] = field(default_factory=list)
    requeued: Event | None = None
    last_time: float = 0.0
    saved_before: int = 0
    """The step that the attempts before it left to start from, or 0 (if it began anew, too)."""
    restarted: bool = False
    """Whether it began anew at step 0, with nothing left of what was saved."""

    @property
    def saved_step(self) -> int:
        """The furthest step that the next attempt can start from."""
        saved = [event for event in (self.resumed, *self.checkpoints) if event is not None]
        return max((int(event["step"]) for event in saved), default=0)

    @property
    def last_step(self) -> int:
        """The furthest step that was reached."""
        steps = [event["step"] for event in (self.resumed, self.ended, *self.checkpoints) if event is not None]
        return max((int(step) for step in steps if step is not None), default=0)

    @property
    def first_step(self) -> int:
        """The step that it started from, or would have started from."""
        return int(self.resumed["step"]) if self.resumed else self.saved_before

    @property
    def has_saved_more(self) -> bool:
        """Whether it saved a step after the one that it started from."""
        return any(event["step"] > self.first_step for event in self.checkpoints)

    @property
    def has_trained(self) -> bool:
        """Whether it came further than the step that it started from, saved or not."""
        return self.last_step > self.first_step


def attempts(events: list[Event]) -> list[Attempt]:
    """Group the ledger's lines by attempt, in order."""
    grouped: dict[int, Attempt] = {}
    for event in events:
        attempt = grouped.setdefault(event["attempt"], Attempt(event["attempt"]))
        if event["event"] not in TIDYING or not attempt.last_time:
            attempt.last_time = event["time"]
        match event["event"]:
            case "attempt_started":
                attempt.started = event
            case "attempt_ended":
                attempt.ended = event
            case "resumed":
                attempt.resumed = event
            case "restarted":
                attempt.restarted = True
            case "requeued":
                attempt.requeued = event
            case "signal":
                attempt.signals.append(event)
            case "checkpoint":
                attempt.checkpoints.append(event)
    in_order, saved = [grouped[number] for number in sorted(grouped)], 0
    for attempt in in_order:
        attempt.saved_before = 0 if attempt.restarted else saved
        saved = attempt.saved_step or saved
    return in_order


def finished(events: list[Event]) -> Event | None:
    """The `finished` line, if the run has one."""
    return next((event for event in events if event["event"] == "finished"), None)


def next_attempt(events: list[Event]) -> int:
    """The number of the attempt that starts now."""
    return 1 + max((int(event["attempt"]) for event in events), default=0)


def attempt_of(events: list[Event], job: tuple[str, int] | None) -> int:
    """The number of the attempt that a process belongs to; the same on every rank of a job.

    Args:
        job: Slurm's job id and restart count, or None outside Slurm.
    """
    started = [event for event in events if event["event"] == "attempt_started"]
    if started and job == (
        started[-1]["job_id"],
        started[-1]["restart_count"],
    ):  # an older match is another cluster's job
        return int(started[-1]["attempt"])
    return next_attempt(events)


def last_step(run: RunDirectory, number: int) -> int:
    """The last step of attempt `number`, from its lines and the progress file, which may be some steps ahead.

    An attempt that ended before it had made or loaded a step is where it would have begun: at the last saved step.
    """
    this = next((a for a in attempts(Ledger(run.ledger).read()) if a.number == number), Attempt(number))
    return furthest_step(this, read(run))


def furthest_step(attempt: Attempt, now: Progress | None) -> int:
    """The last step of an attempt, as `last_step` gives it, by what has been read already."""
    step = attempt.last_step
    if now is not None and now.attempt == attempt.number:
        step = max(step, now.step)
    return step or attempt.saved_before


def last_seen(run: RunDirectory, number: int) -> float:
    """When attempt `number` was last seen alive, Unix seconds: by its lines and the progress file; 0 if never."""
    seen = [float(event["time"]) for event in Ledger(run.ledger).read() if event["attempt"] == number]
    now = read(run)
    return max([*seen, *([now.time] if now is not None and now.attempt == number else [])], default=0.0)
