"""What preemption, queueing, failures and saving have cost over many runs, since a moment, by user."""

import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from outlast.errors import ConfigError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.progress import read

from .accounting import BETWEEN, INSIDE, AttemptTime, Span, cost, hours_of, times
from .attempts import attempt_rows
from .find import owner_name
from .state import started_attempts
from .submissions import submission_of

Summary = dict[str, Any]
_UNITS = {"min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def moment(text: str, now: float) -> float:
    """The moment that `--since` names, Unix seconds: `7d`, `12h`, `2w`, `90min`, or a date such as `2026-11-01`.

    Raises:
        ConfigError: it is neither.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min|h|d|w)", text.strip()):
        return now - float(found[1]) * _UNITS[found[2]]
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError("--since", text, "valid: 90min, 12h, 7d, 2w, or a date such as 2026-11-01") from None


def summarize_since(runs: Iterable[RunDirectory], since: float) -> Summary:
    """Sum what runs have cost from `since`, Unix seconds, until now; the schema stands in docs/report.md."""
    users: dict[str, Summary] = {}
    for run in runs:
        events = Ledger(run.ledger).read()
        tries = started_attempts(events)
        rows = attempt_rows(tries, events, read(run)) if tries else []
        if all(row["end"] < since for row in rows):  # a running attempt's is that of its progress
            continue
        submission = submission_of(run)
        found = [_clipped(one, since) for one in times(rows, tries, events, submission.time if submission else 0.0)]
        user = users.setdefault(owner_name(run.path), _nothing())
        user["runs"] += 1
        pairs = list(zip(rows, found, strict=True))
        user["attempts"] += sum(one.seconds > 0 for one in found)
        user["preemptions"] += sum(row["cause"] == "preempted" and row["end"] >= since for row in rows)
        user["steps_lost"] += sum(row["steps_lost"] for row in rows if row["end"] >= since)
        user["accelerator_hours"] += sum(hours_of(one.seconds, row) for row, one in pairs)
        for name in INSIDE:
            user["parts"][name] += sum(hours_of(one.parts()[name], row) for row, one in pairs)
        for name in BETWEEN:
            user["waited_s"][name] += sum(getattr(one, name) for one in found)
        for cause, entry in cost(rows, found).items():
            held = user["cost"].setdefault(cause, dict.fromkeys(entry, 0.0))
            for name, value in entry.items():
                held[name] += value
    return {"since": since, "until": time.time(), "total": _sum(users.values()), "users": users}


def _nothing() -> Summary:
    """The sums before anything is added: `parts` in accelerator hours, `waited_s` in seconds."""
    counts = dict.fromkeys(("runs", "attempts", "preemptions", "steps_lost"), 0)
    sums = {"parts": dict.fromkeys(INSIDE, 0.0), "waited_s": dict.fromkeys(BETWEEN, 0.0)}
    return {**counts, "accelerator_hours": 0.0, **sums, "cost": {}}


def _sum(users: Iterable[Summary]) -> Summary:
    total = _nothing()
    for user in users:
        for name, value in user.items():
            if not isinstance(value, dict):
                total[name] += value
                continue
            for key, more in value.items():
                if isinstance(more, dict):
                    entry = total[name].setdefault(key, dict.fromkeys(more, 0.0))
                    for unit, number in more.items():
                        entry[unit] += number
                else:
                    total[name][key] += more
    return total


def _clipped(time: AttemptTime, since: float) -> AttemptTime:
    """The part of an attempt, and of the wait before it, from a moment on."""
    spans = [Span(span.what, max(span.start, since), span.end) for span in time.spans if span.end > since]
    waits = time.start - time.queued, time.start - time.queued - time.stopped
    return AttemptTime(
        max(time.start, min(since, time.end)),
        time.end,
        spans,
        queued=max(time.start - max(waits[0], since), 0.0),
        stopped=max(waits[0] - max(waits[1], since), 0.0),
    )
