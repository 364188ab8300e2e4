"""Reads the ledger back: one value for each attempt, and the attempt that a process belongs to."""

from dataclasses import dataclass, field

from .directory import RunDirectory
from .ledger import Event, Ledger
from .progress import read

ATTEMPT_ENV = "OUTLAST_ATTEMPT"
"""Tells a rank the number of its attempt."""


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


def attempts(events: list[Event]) -> list[Attempt]:
    """Group the ledger's lines by attempt, in order."""
    grouped: dict[int, Attempt] = {}
    for event in events:
        attempt = grouped.setdefault(event["attempt"], Attempt(event["attempt"]))
        attempt.last_time = event["time"]
        match event["event"]:
            case "attempt_started":
                attempt.started = event
            case "attempt_ended":
                attempt.ended = event
            case "resumed":
                attempt.resumed = event
            case "requeued":
                attempt.requeued = event
            case "signal":
                attempt.signals.append(event)
            case "checkpoint":
                attempt.checkpoints.append(event)
    return [grouped[number] for number in sorted(grouped)]


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
    known, now = attempts(Ledger(run.ledger).read()), read(run)
    steps = [attempt.last_step for attempt in known if attempt.number == number]
    if now is not None and now.attempt == number:
        steps.append(now.step)
    saved = [attempt.saved_step for attempt in known if attempt.number < number and attempt.saved_step]
    return max(steps, default=0) or (saved[-1] if saved else 0)
