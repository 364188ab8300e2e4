"""The attempts of a run, one row each: steps, seconds and bytes, by the ledger's lines."""

from itertools import pairwise
from typing import Any

from outlast.rundir.attempts import TIDYING, Attempt, furthest_step
from outlast.rundir.ledger import KILLED, Event
from outlast.rundir.progress import Progress

AttemptRow = dict[str, Any]


def attempt_rows(tries: list[Attempt], events: list[Event], now: Progress | None) -> list[AttemptRow]:
    """One row an attempt, as `outlast report --json` shows it.

    Args:
        now: the last progress that was written, which is ahead of the lines of an attempt that runs or was killed.
    """
    lines, rows, saved = by_attempt(events), list[AttemptRow](), False
    for attempt in tries:
        rows.append(_attempt(attempt, lines[attempt.number], now, saved_before=saved))
        saved = saved or bool(attempt.checkpoints)
    _count_lost(rows)
    return rows


def by_attempt(events: list[Event]) -> dict[int, list[Event]]:
    """The lines of each attempt, by its number."""
    lines: dict[int, list[Event]] = {}
    for event in events:
        lines.setdefault(event["attempt"], []).append(event)
    return lines


def made_again_from(rows: list[AttemptRow]) -> dict[int, int]:
    """By attempt, the first step that a later one has gone on from: what came after it was made again."""
    found, least = dict[int, int](), None
    for row in reversed(rows):
        if least is not None:
            found[row["number"]] = least
        if _has_moved(row):
            least = row["first_step"] if least is None else min(least, row["first_step"])
    return found


def _has_moved(row: AttemptRow) -> bool:
    return bool(row["steps_done"]) or row["resume_s"] is not None


def _attempt(attempt: Attempt, lines: list[Event], now: Progress | None, *, saved_before: bool) -> AttemptRow:
    """One attempt, by its own lines.

    Args:
        saved_before: an earlier attempt has saved a checkpoint.
    """
    started, ended, resumed = attempt.started or {}, attempt.ended, attempt.resumed
    killed = ended is None or ended.get("detail") == KILLED
    # The next attempt writes the end of one that was killed: its last sign of life is what came before.
    afterwards = ("attempt_ended", "requeued", "gave_up", *TIDYING) if killed else ()
    seen = [event["time"] for event in lines if event["event"] not in afterwards]
    seen += [ended["last_seen"]] if ended and "last_seen" in ended else []
    end = ended["time"] if ended and not killed else max(seen, default=lines[0]["time"])
    last = furthest_step(attempt, now) if killed else attempt.last_step
    if killed and now is not None and now.attempt == attempt.number:
        end = max(end, now.time)
    worked = resumed or attempt.checkpoints or any(event["event"] == "evaluated" for event in lines)
    first_step = resumed["step"] if resumed else 0
    if not worked and saved_before:
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
    """Count for each attempt the steps that a later one had to make again: not always the next one."""
    moved = [row for row in rows if _has_moved(row)]
    for before, after in pairwise(moved):
        # A checkpoint may outlive a kill that its line in the ledger did not: then it vouches for the step.
        made = max(after["first_step"] - before["last_step"], 0)
        before["last_step"] += made
        before["steps_done"] += made
    remade = made_again_from(rows)
    for row in moved:
        again_from = max(remade.get(row["number"], row["last_step"]), row["first_step"])
        row["steps_lost"] = max(row["last_step"] - again_from, 0)
