"""The attempts of a run, one row each: steps, seconds and bytes, by the ledger's lines."""

from itertools import pairwise
from typing import Any

from outlast.rundir import progress
from outlast.rundir.attempts import TIDYING, Attempt, last_step
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import KILLED, Event

AttemptRow = dict[str, Any]


def attempt_rows(run: RunDirectory, tries: list[Attempt], events: list[Event]) -> list[AttemptRow]:
    """One row an attempt, as `outlast report --json` shows it."""
    rows = [_attempt(run, attempt, events) for attempt in tries]
    _count_lost(rows)
    return rows


def _attempt(run: RunDirectory, attempt: Attempt, events: list[Event]) -> AttemptRow:
    """One attempt, by its own lines."""
    lines = [event for event in events if event["attempt"] == attempt.number]
    started, ended, resumed = attempt.started or {}, attempt.ended, attempt.resumed
    killed = ended is None or ended.get("detail") == KILLED
    # The next attempt writes the end of one that was killed: its last sign of life is what came before.
    afterwards = ("attempt_ended", "requeued", "gave_up", *TIDYING) if killed else ()
    seen = [event["time"] for event in lines if event["event"] not in afterwards]
    seen += [ended["last_seen"]] if ended and "last_seen" in ended else []
    end = ended["time"] if ended and not killed else max(seen, default=lines[0]["time"])
    last, now = last_step(run, attempt.number) if killed else attempt.last_step, progress.read(run)
    if killed and now is not None and now.attempt == attempt.number:
        end = max(end, now.time)
    worked = resumed or attempt.checkpoints or any(event["event"] == "evaluated" for event in lines)
    sealed_before = any(e["event"] == "checkpoint" and e["attempt"] < attempt.number for e in events)
    first_step = resumed["step"] if resumed else 0
    if not worked and sealed_before:
        first_step = last  # stopped while it loaded: the step in its lines is the one it would have resumed from
    return {
        "number": attempt.number,
        "job_id": started.get("job_id"),
        "hosts": started.get("hosts", []),
        "world_size": started.get("world_size"),
        "start": lines[0]["time"],
        "end": end,
        "seconds": max(end - lines[0]["time"], 0.0),
        "cause": ended["cause"] if ended else None,
        "killed": killed,
        "first_step": first_step,
        "last_step": last,
        "steps_done": max(last - first_step, 0),
        "steps_lost": 0,
        "resume_s": min(resumed["seconds"], max(end - lines[0]["time"], 0.0)) if resumed else None,
        "signal": attempt.signals[-1]["name"] if attempt.signals else None,
        "signal_to_sealed_s": _signal_to_sealed(attempt),
        "checkpoints": len(attempt.checkpoints),
        "bytes": sum(event["bytes"] for event in attempt.checkpoints),
    }


def _signal_to_sealed(attempt: Attempt) -> float | None:
    """Seconds from the last signal until its step was sealed; 0 if it was before, None if never."""
    if not attempt.signals:
        return None
    signal = attempt.signals[-1]
    for event in attempt.checkpoints:
        if event["kind"] == "emergency":
            sealed = event["sealed_s"]
            return float(max(event["time"] - signal["time"], 0.0) if sealed is None else sealed)
    safe = [event["step"] for event in (attempt.resumed, *attempt.checkpoints) if event is not None]
    return 0.0 if signal["step"] in safe else None


def _count_lost(rows: list[AttemptRow]) -> None:
    """Count for each attempt the steps that the next attempt had to make again."""
    moved = [row for row in rows if row["steps_done"] or row["resume_s"] is not None]
    for before, after in pairwise(moved):
        # A checkpoint may outlive a kill that its line in the ledger did not: then it vouches for the step.
        made = max(after["first_step"] - before["last_step"], 0)
        before["last_step"] += made
        before["steps_done"] += made
        before["steps_lost"] = before["last_step"] - after["first_step"]
