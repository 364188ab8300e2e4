"""The report of a run as plain values, from its ledger and its directory."""

from itertools import pairwise
from typing import Any

from outlast.checkpoint import interval
from outlast.errors import ConfigError
from outlast.files import bytes_used
from outlast.rundir import ancestry, progress
from outlast.rundir.attempts import finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Event, Ledger
from outlast.rundir.progress import Progress

from .accounting import account, coarse, times
from .attempts import attempt_rows
from .curves import curves, disk
from .find import name_of
from .settings import best_metric, budget_of, settings_of
from .state import State, started_attempts, state_of
from .submissions import submission_of

Summary = dict[str, Any]


def summarize(
    run: RunDirectory, events: list[Event] | None = None, settings: dict[str, dict[str, Any]] | None = None
) -> Summary:
    """Collect the report as plain values, as `--json` prints them.

    Times are Unix seconds, lengths seconds, sizes bytes.

    `steps_lost` counts the steps that had to be made again: of each attempt, those after the first step from which a
    later one went on.

    `goodput` is the share of the wall time that was spent on steps and evaluations that count (`accounting.py`). The
    schema stands in docs/report.md.

    Args:
        events: the lines of its ledger, `settings` those of `settings_of`; both are read if they are left out.

    Raises:
        ConfigError: the run has not started.
    """
    events = Ledger(run.ledger).read() if events is None else events
    tries = started_attempts(events)
    if not tries:
        raise ConfigError("RUN", run.path.name, "it has not started yet, so there is nothing to report")
    settings = settings_of(run) if settings is None else settings
    state, done, now = state_of(run, events), finished(events), progress.read(run)
    rows = attempt_rows(tries, events, now)
    submission = submission_of(run)
    submitted = submission.time if submission else 0.0
    rows[-1]["killed"] &= state != State.RUNNING
    time = times(rows, tries, events, submitted)
    wall_s = time[-1].end - time[0].start
    for row, one in zip(rows, time, strict=True):
        row |= {
            "allocated_s": one.seconds,
            "queued_s": one.queued,
            "stopped_s": one.stopped,
            "parts": one.parts(),
            "spans": [[span.what, span.start, span.end] for span in coarse(one, wall_s)],
        }
    accounting = account(rows, time, submitted, events)
    made, lost = sum(row["steps_done"] for row in rows), sum(row["steps_lost"] for row in rows)
    wall = max(row["end"] for row in rows) - rows[0]["start"]
    resuming = sum(row["resume_s"] or 0.0 for row in rows)
    inside = sum(row["seconds"] for row in rows) - resuming
    saved, used = [event for attempt in tries for event in attempt.checkpoints], bytes_used(run.path)
    count = {kind: sum(e["kind"] == kind for e in saved) for kind in ("periodic", "emergency", "final")}
    return {
        "run": run.path.name,
        "name": name_of(run),
        "path": str(run.path),
        "state": state,
        "finished": done is not None,
        "began_with": before.words if (before := ancestry.read(run)) else None,
        "final_step": done["step"] if done else None,
        "model_step": done.get("model_step", done["step"]) if done else None,
        "step": max(row["last_step"] for row in rows),
        "total_steps": _total_steps(now, settings["trainer"]),
        "steps_done": made,
        "steps_lost": lost,
        "preemptions": sum(row["cause"] == "preempted" for row in rows),
        "requeues": sum(event["event"] == "requeued" for event in events),
        "seconds": {
            "total": wall,
            "training": inside,
            "resuming": resuming,
            "between_attempts": sum(max(b["start"] - a["end"], 0.0) for a, b in pairwise(rows)),
        },
        "goodput": accounting["goodput"]["wall"],
        "accounting": accounting,
        "checkpoints": {
            "count": len(saved),
            **count,
            "failed": sum(event["event"] == "checkpoint_failed" for event in events),
            "mean_stall_s": sum(e["stall_s"] for e in saved) / len(saved) if saved else None,
            "max_sealed_s": max((e["sealed_s"] for e in saved if e["sealed_s"] is not None), default=None),
            "bytes": sum(e["bytes"] for e in saved),
        },
        "interval": _interval(events),
        "quarantined": [
            {"checkpoint": e["checkpoint"], "reason": e["reason"]} for e in events if e["event"] == "quarantined"
        ],
        "deleted": sum(event["event"] == "deleted" for event in events),
        "data_notes": next((e["notes"] for e in reversed(events) if e["event"] == "data"), []),
        "over_budget": max((e["bytes"] for e in events if e["event"] == "over_budget"), default=None),
        "not_saved": {path: why for e in events if e["event"] == "not_saved" for path, why in e["objects"].items()},
        "batches_differ": [e["step"] for e in events if e["event"] == "batch_differs"],
        "diverged": _diverged(events),
        "not_finite": next((event["step"] for event in events if event["event"] == "not_finite"), None),
        "batches_unknown": any(event["event"] == "batches_unknown" for event in events),
        "bytes_used": used,
        "bytes_peak": _peak(used, now, saved),
        "budget_bytes": budget_of(settings),
        "best": best_metric(events, settings["trainer"]),
        "curves": curves(run, rows, events, settings["trainer"]),
        "disk": disk(events),
        "attempts": rows,
    }


def _diverged(events: list[Event]) -> str | None:
    """Why the guard has stopped the last attempt, if it has."""
    ended = [event for event in events if event["event"] == "attempt_ended"]
    kind, _, why = (ended[-1].get("error") or "" if ended else "").partition(": ")
    return why.partition(":")[0] if kind == "DivergedError" else None


def _interval(events: list[Event]) -> Summary | None:
    """The interval between periodic saves that `checkpoint.every=auto` came to last, and why."""
    last = next((event for event in reversed(events) if event["event"] == "interval"), None)
    if last is None:
        return None
    values = {name: last[name] for name in ("seconds", "cost_s", "mtbf_s")}
    return {**values, "explanation": interval.explain(**values)}


def _peak(used: int, now: Progress | None, saved: list[Event]) -> int:
    """Find the most bytes that were seen in use at any time."""
    seen = [int(event.get("run_bytes", 0)) for event in saved]
    return max(used, now.bytes_peak if now else 0, *seen)


def _total_steps(now: Progress | None, trainer: Summary) -> int | None:
    return (now.total_steps if now else None) or max(int(trainer.get("max_steps") or 0), 0) or None
