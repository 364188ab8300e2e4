"""The state of a run, by its ledger, its lock and its other records; Slurm is not asked."""

import fcntl
import socket
import time
from enum import StrEnum, auto

from outlast.files import read_json
from outlast.rundir import progress
from outlast.rundir.attempts import Attempt, attempts, finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.lease import is_kept
from outlast.rundir.ledger import Event
from outlast.rundir.place import is_of_another

from .submissions import cancelled_at, submission_of


class State(StrEnum):
    """What a run is doing, as `outlast status` says it."""

    NOT_STARTED = auto()
    QUEUED = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    INTERRUPTED = auto()
    STOPPED_UNEXPECTEDLY = auto()
    FAILED = auto()
    CANCELLED = auto()
    GAVE_UP = auto()
    FINISHED = auto()


FRESH_S = 60.0
"""Age up to which `progress.json` counts as a sign of life, where the lock can't tell (another host holds it)."""


def state_of(run: RunDirectory, events: list[Event]) -> State:
    """The state of a run by ledger, lock and `progress.json`, by its submission, and by whether it was cancelled."""
    if finished(events):
        return State.FINISHED
    held, tries = is_locked(run), started_attempts(events)
    if held:
        return State.RUNNING
    submission, cancelled = submission_of(run), cancelled_at(run) or 0.0
    submitted, newest = submission.time if submission else 0.0, tries[-1] if tries else None
    began = newest.started["time"] if newest and newest.started else 0.0
    if cancelled > max(submitted, began) and (newest is None or newest.ended or newest.requeued):
        return State.CANCELLED
    resubmitted = submitted > max((event["time"] for event in events), default=0.0)
    if newest is None or resubmitted:
        return State.QUEUED if resubmitted else State.NOT_STARTED
    if any(event["event"] == "gave_up" and event["attempt"] >= newest.number for event in events):
        return State.GAVE_UP
    if newest.requeued is not None:
        return State.INTERRUPTED if _is_copied(run, newest) else State.QUEUED
    if newest.ended is None:
        if _is_copied(run, newest):
            return State.STOPPED_UNEXPECTEDLY
        now = progress.read(run)
        alive = held is None and now is not None and time.time() - now.time < FRESH_S
        return State.RUNNING if alive and now and now.phase != "done" else State.STOPPED_UNEXPECTEDLY
    match newest.ended["cause"]:
        case "cancelled" | "finished" as cause:
            return State(cause)
        case "failed" | "out_of_memory":
            return State.FAILED
        case _:
            return State.INTERRUPTED if job_id_of(run, newest) is None else State.PREEMPTED


def started_attempts(events: list[Event]) -> list[Attempt]:
    """The attempts that did anything: a number that only `gave_up` or `deleted` lines bear is none."""
    return [a for a in attempts(events) if a.started or a.resumed or a.ended or a.checkpoints or a.signals]


def is_locked(run: RunDirectory) -> bool | None:
    """Whether a living process holds the run; None if that can't be known from this host."""
    if is_kept(run.lease):
        return True
    try:
        with open(run.lock, "rb") as file:
            # Shared and for an instant: it stops no other reader, and a starting attempt tries again.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            holder = read_json(run.lock)
    except BlockingIOError:
        return True
    except OSError:
        return None
    # Not every shared file system shows the locks of other hosts: "free" is sure only about a holder of this host.
    return False if isinstance(holder, dict) and holder.get("host") == socket.gethostname() else None


def job_id_of(run: RunDirectory, newest: Attempt | None) -> str | None:
    """The job that was named last: by the submission, by the newest attempt, or by its requeue."""
    submission = submission_of(run)
    event = (newest.requeued or newest.started) if newest else None
    if submission is not None and (newest is None or event is None or submission.time > newest.last_time):
        return submission.job_id
    if newest is None or event is None or event["job_id"] is None or _is_copied(run, newest):
        return None
    return str(event["job_id"])


def _is_copied(run: RunDirectory, newest: Attempt) -> bool:
    """Whether the newest attempt was another directory's, of which this one is a copy: its job is not this run's."""
    event = newest.requeued or newest.started
    return event is not None and is_of_another(event.get("place"), run.path)
