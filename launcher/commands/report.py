"""What happened to a run: attempts, causes, steps, seconds and bytes, from its ledger and its directory."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from outlast.checkpoint import interval
from outlast.errors import ConfigError, Exit
from outlast.files import bytes_used, to_json
from outlast.rundir import ancestry, progress
from outlast.rundir.attempts import finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Event, Ledger

from ..display.progress import duration, size
from ..runs.attempts import attempt_rows
from ..runs.find import run_named
from ..runs.settings import best_metric, budget_of, settings_of
from ..runs.state import State, started_attempts, state_of

Summary = dict[str, Any]

WIDE = 110
"""Columns that the whole table of attempts takes."""
WHERE = ("job", "hosts", "ranks")
"""What is left out on a narrower terminal; `--json` has it."""


def main(name: str, root: Path, *, as_json: bool) -> int:
    """`outlast report RUN`: a name under `root`, or a run directory's path."""
    summary = summarize(run_named(name, root))
    if as_json:
        print(to_json(summary, indent=1))
    else:
        console = Console(highlight=False)
        render(summary, console if console.is_terminal else Console(highlight=False, width=200))
    return Exit.DONE


def summarize(run: RunDirectory) -> Summary:
    """Collect the report as plain values, as `--json` prints them.

    Times are Unix seconds, lengths seconds, sizes bytes.

    `steps_lost` counts the steps that had to be made again: for each attempt that went on from a checkpoint, the
    furthest step of the attempt before, less the step it went on from.

    `goodput` is the share of the wall time, from the first start to the last end, that was spent on steps that count:
    the seconds inside attempts, less what each took to resume, times the share of all steps made that were not lost,
    over the wall time.

    Raises:
        ConfigError: the run has not started.
    """
    events = Ledger(run.ledger).read()
    tries = started_attempts(events)
    if not tries:
        raise ConfigError("RUN", run.path.name, "it has not started yet, so there is nothing to report")
    settings, state, done = settings_of(run), state_of(run, events), finished(events)
    rows = attempt_rows(run, tries, events)
    rows[-1]["killed"] &= state != State.RUNNING
    made, lost = sum(row["steps_done"] for row in rows), sum(row["steps_lost"] for row in rows)
    wall = max(row["end"] for row in rows) - rows[0]["start"]
    resuming = sum(row["resume_s"] or 0.0 for row in rows)
    inside = sum(row["seconds"] for row in rows) - resuming
    saved = [event for attempt in tries for event in attempt.checkpoints]
    count = {kind: sum(e["kind"] == kind for e in saved) for kind in ("periodic", "emergency", "final")}
    return {
        "run": run.path.name,
        "path": str(run.path),
        "state": state,
        "finished": done is not None,
        "began_with": before.words if (before := ancestry.read(run)) else None,
        "final_step": done["step"] if done else None,
        "model_step": done.get("model_step", done["step"]) if done else None,
        "step": max(row["last_step"] for row in rows),
        "total_steps": _total_steps(run, settings["trainer"]),
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
        "goodput": inside * (made - lost) / (made * wall) if made and wall > 0 else None,
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
        "bytes_used": bytes_used(run.path),
        "bytes_peak": _peak(run, saved),
        "budget_bytes": budget_of(settings),
        "best": best_metric(events, settings["trainer"]),
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


def _peak(run: RunDirectory, saved: list[Event]) -> int:
    """Find the most bytes that were seen in use at any time."""
    now = progress.read(run)
    seen = [int(event.get("run_bytes", 0)) for event in saved]
    return max(bytes_used(run.path), now.bytes_peak if now else 0, *seen)


def _total_steps(run: RunDirectory, trainer: Summary) -> int | None:
    now = progress.read(run)
    return (now.total_steps if now else None) or max(int(trainer.get("max_steps") or 0), 0) or None


def render(summary: Summary, console: Console) -> None:
    """Print the report."""
    total, seconds, saves = summary["total_steps"], summary["seconds"], summary["checkpoints"]
    goodput = "?" if summary["goodput"] is None else f"{summary['goodput']:.1%}"
    stall = "" if saves["mean_stall_s"] is None else f", {duration(saves['mean_stall_s'])} of stall each"
    console.print(Text(f"{summary['run']}: {summary['state'].replace('_', ' ')}", style="bold"))
    best = f"; the model is that of step {summary['model_step']}, the best"
    best = best if summary["model_step"] != summary["final_step"] else ""
    facts = {
        "steps": f"{summary['step']}/{'?' if total is None else total}, {summary['steps_lost']} lost{best}",
        "attempts": f"{len(summary['attempts'])}: {summary['preemptions']} preempted, {summary['requeues']} requeued",
        "time": f"{duration(seconds['total'])}: {duration(seconds['training'])} training, "
        f"{duration(seconds['resuming'])} resuming, {duration(seconds['between_attempts'])} between attempts",
        "goodput": goodput,
        "checkpoints": f"{saves['count']} ({saves['periodic']} periodic, {saves['emergency']} emergency, "
        f"{saves['final']} final), {size(saves['bytes'])} written{stall}",
        "put aside": f"{len(summary['quarantined'])} quarantined, {summary['deleted']} deleted",
        "on disk": size(summary["bytes_used"], summary["budget_bytes"]) + (f", peak {size(summary['bytes_peak'])}"),
    }
    if summary["began_with"]:
        facts["began with"] = summary["began_with"]
    if summary["over_budget"]:
        facts["over budget"] = f"{size(summary['over_budget'])} were there at once: others write into the run directory"
    if summary["not_saved"]:
        facts["not saved"] = "; ".join(f"{path}: {why}" for path, why in summary["not_saved"].items())
    if summary["diverged"]:
        facts["diverged"] = f"{summary['diverged']}; the newest checkpoint is from before that"
    if summary["not_finite"] is not None:
        facts["not finite"] = f"a loss was NaN or infinite at step {summary['not_finite']}, or another logged value was"
    if summary["batches_differ"]:
        facts["data differs"] = f"after a resume at step {', '.join(map(str, summary['batches_differ']))}"
    if summary["batches_unknown"]:
        facts["data unknown"] = (
            "the loop reads a DataLoader by itself, without run.epochs: a resume begins its epoch anew"
        )
    if summary["interval"]:
        facts["interval"] = summary["interval"]["explanation"]
    if best := summary["best"]:
        facts["best"] = f"{best['name']} {best['value']:.4g} at step {best['step']}"
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)
    table = Table(box=None, pad_edge=False, header_style="dim")
    rows = [_cells(row) for row in summary["attempts"]]
    shown = [name for name in rows[0] if console.width >= WIDE or name not in WHERE]
    for name in shown:
        table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*(Text(cells[name]) for name in shown))
    console.print(table, highlight=False)
    for note in summary["data_notes"]:
        console.print(Text(note, style="yellow"))
    for bad in summary["quarantined"]:
        console.print(Text(f"quarantined {bad['checkpoint']}: {bad['reason']}", style="yellow"))


def _cells(row: Summary) -> dict[str, str]:
    """One attempt, by column."""
    ended = row["cause"] or ("killed" if row["killed"] else "running")
    sealed = row["signal_to_sealed_s"]
    return {
        "attempt": str(row["number"]),
        "job": row["job_id"] or "",
        "hosts": ", ".join(row["hosts"]),
        "ranks": str(row["world_size"] or ""),
        "time": duration(row["seconds"]),
        "steps": f"{row['first_step']} to {row['last_step']}",
        "lost": str(row["steps_lost"]),
        "ended": f"{ended}, killed" if row["killed"] and row["cause"] else ended,
        "signal": row["signal"] or "",
        "to sealed": "" if sealed is None else duration(sealed),
        "bytes": size(row["bytes"]),
    }
