"""The report of a run as a terminal shows it."""

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runs.accounting import cause_of
from .progress import duration, size

Summary = dict[str, Any]

WIDE = 130
"""Columns that the whole table of attempts takes."""
VALUES = 8
"""Values of a swept key whose metric is shown, at most; `--html` and `--json` have all."""
WHERE = ("job", "hosts", "ranks", "waited", "start")
"""What is left out on a narrower terminal; `--json` has it."""


def render(summary: Summary, console: Console) -> None:
    """Print the report."""
    total, saves = summary["total_steps"], summary["checkpoints"]
    stall = "" if saves["mean_stall_s"] is None else f", {duration(saves['mean_stall_s'])} of stall each"
    console.print(Text(f"{summary['run']}: {summary['state'].replace('_', ' ')}", style="bold"))
    best = f"; the model is that of step {summary['model_step']}, the best"
    best = best if summary["model_step"] != summary["final_step"] else ""
    facts = {
        "steps": f"{summary['step']}/{'?' if total is None else total}, {summary['steps_lost']} lost{best}",
        "attempts": f"{len(summary['attempts'])}: {summary['preemptions']} preempted, {summary['requeues']} requeued",
        "time": time_text(summary["accounting"]),
        "goodput": goodput_text(summary["accounting"]["goodput"]),
        "rank time": cost_text(summary["accounting"]),
        "checkpoints": f"{saves['count']} ({saves['periodic']} periodic, {saves['emergency']} emergency, "
        f"{saves['final']} final), {size(saves['bytes'])} written{stall}",
        "put aside": f"{len(summary['quarantined'])} quarantined, {summary['deleted']} deleted",
        "on disk": size(summary["bytes_used"], summary["budget_bytes"]) + (f", peak {size(summary['bytes_peak'])}"),
    }
    facts |= notes_of(summary)
    _print_facts(facts, console)
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


def _print_facts(facts: dict[str, str], console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)


def notes_of(summary: Summary) -> dict[str, str]:
    """What a reader of this run has to know besides, by name."""
    facts: dict[str, str] = {}
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
    return facts


def time_text(accounting: Summary) -> str:
    """What the wall time went into, the largest part first: `43 s: 22 s training, 13 s starting`."""
    parts = sorted(accounting["parts"].items(), key=lambda part: -part[1])
    text = ", ".join(f"{duration(seconds)} {name}" for name, seconds in parts if seconds > 0)
    wait = accounting["first_wait_s"]
    return f"{duration(accounting['wall_s'])}: {text}" + (f"; {duration(wait)} queued before it" if wait else "")


def goodput_text(goodput: Summary) -> str:
    """Both shares, and the formula."""
    if goodput["wall"] is None:
        return "?"
    shares = f"{goodput['wall']:.1%} since the first start, {goodput['allocated']:.1%} in attempts"
    return f"{shares}: {goodput['formula'].partition('= ')[2]}"


def cost_text(accounting: Summary) -> str:
    """The time of all ranks together, and what each cause has cost of it, the most expensive first."""
    costs = sorted(accounting["cost"].items(), key=lambda cost: -cost[1]["accelerator_hours"])
    text = ", ".join(
        f"{cause.replace('_', ' ')} {hours(cost['accelerator_hours'])}"
        for cause, cost in costs
        if cost["accelerator_hours"]
    )
    return f"{hours(accounting['accelerator_hours']) or '0 h'}" + (f"; cost: {text}" if text else "")


def hours(value: float) -> str:
    """Write hours with three digits; less than one as minutes and seconds."""
    if value < 1:
        return duration(value * 3600) if value else ""
    return f"{value:,.0f} h" if value >= 100 else f"{value:.3g} h"


def _cells(row: Summary) -> dict[str, str]:
    """One attempt, by column."""
    ended = cause_of(row)
    sealed = row["signal_to_sealed_s"]
    return {
        "attempt": str(row["number"]),
        "job": row["job_id"] or "",
        "hosts": ", ".join(row["hosts"]),
        "ranks": str(row["world_size"] or ""),
        "waited": duration(row["queued_s"] + row["stopped_s"]) if row["queued_s"] + row["stopped_s"] >= 0.05 else "",
        "start": duration(row["parts"]["starting"]),
        "time": duration(row["seconds"]),
        "steps": f"{row['first_step']} to {row['last_step']}",
        "lost": str(row["steps_lost"]),
        "ended": f"{ended}, killed" if row["killed"] and row["cause"] else ended,
        "signal": row["signal"] or "",
        "to sealed": "" if sealed is None else duration(sealed),
        "bytes": size(row["bytes"]),
    }


def sweep_cells(summary: Summary, cells: list[Summary]) -> tuple[list[str], list[list[str]]]:
    """The table of a sweep: headers, and the cells as text."""
    headers = ["cell", *summary["keys"], "state", summary["metric"] or "metric", "at step", "step", "attempts"]
    headers += ["preempted", "lost", "goodput", "hours", "time", "bytes"]
    return headers, [_sweep_cell(summary, cell) for cell in cells]


def _sweep_cell(summary: Summary, cell: Summary) -> list[str]:
    metric, total = cell["metric"], cell["total_steps"]
    return [
        cell["cell"],
        *(cell["overrides"].get(key, "") for key in summary["keys"]),
        cell["state"].replace("_", " "),
        f"{metric['value']:.4g}" if metric else "",
        str(metric["step"]) if metric else "",
        f"{cell['step']}/{'?' if total is None else total}",
        str(cell["attempts"]),
        str(cell["preemptions"] or ""),
        str(cell["steps_lost"] or ""),
        "" if cell["goodput"] is None else f"{cell['goodput']:.1%}",
        hours(cell["accelerator_hours"]),
        "" if cell["wall_s"] is None else duration(cell["wall_s"]),
        "" if cell["bytes_used"] is None else size(cell["bytes_used"]),
    ]


def render_sweep(summary: Summary, cells: list[Summary], console: Console) -> None:
    """Print the report of a sweep: its cells in this order, the best one marked."""
    states = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in sorted(summary["states"].items()))
    console.print(Text(f"{summary['sweep']}: {len(cells)} cells, {states}", style="bold"))
    facts = {"rank time": cost_text(summary)}
    if summary["best"] is not None:
        best = next(cell["metric"] for cell in cells if cell["cell"] == summary["best"])
        facts = {"best": f"{summary['best']}: {best['name']} {best['value']:.4g} at step {best['step']}"} | facts
    for effect in summary["effects"]:
        facts[effect["key"]] = _effect_text(effect, lower=summary["lower_is_better"])
    _print_facts(facts, console)
    headers, rows = sweep_cells(summary, cells)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    filled = [n for n in range(len(headers)) if n == 0 or any(row[n] for row in rows)]
    # The name of a cell is its overrides: beside their columns it says nothing.
    filled = filled[1:] if summary["keys"] and console.width < WIDE else filled
    for number in filled:
        table.add_column(headers[number], overflow="fold")
    for cell, row in zip(cells, rows, strict=True):
        is_best = cell["cell"] == summary["best"]
        table.add_row("*" if is_best else "", *(Text(row[n]) for n in filled), style="bold" if is_best else "")
    console.print(table, highlight=False)


def _effect_text(effect: Summary, *, lower: bool) -> str:
    """The median of the metric by a key's value, with its range; of many, the best ones."""
    values = effect["values"]
    more = len(values) - VALUES
    if more > 0:
        values = sorted(values, key=lambda one: one["median"] * (1 if lower else -1))[:VALUES]
    shown = [
        f"{one['value']}: {one['median']:.4g}" + (f" ({one['least']:.4g} to {one['most']:.4g})" * (one["cells"] > 1))
        for one in values
    ]
    return "; ".join(shown + [f"and {more} more"] * (more > 0))


def render_since(summary: Summary, console: Console) -> None:
    """Print what runs have cost, by user."""
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(summary["since"]))
    total, users = summary["total"], summary["users"]
    console.print(Text(f"since {began}: {total['runs']} runs, {total['attempts']} attempts", style="bold"))
    if not users:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    causes = sorted(total["cost"], key=lambda cause: -total["cost"][cause]["accelerator_hours"])
    useful = ("training", "evaluating")
    for header in ("user", "runs", "preempted", "steps lost", "queued", "hours", *useful, *causes):
        table.add_column(header.replace("_", " "), overflow="fold", justify="left" if header == "user" else "right")
    several = [("all", total)] if len(users) > 1 else []
    for name, user in [*sorted(users.items(), key=lambda one: -one[1]["accelerator_hours"]), *several]:
        table.add_row(
            Text(name),
            *(str(user[key]) for key in ("runs", "preemptions", "steps_lost")),
            duration(user["waited_s"]["queued"]),
            hours(user["accelerator_hours"]),
            *(hours(user["parts"][part]) for part in useful),
            *(hours(user["cost"][cause]["accelerator_hours"]) if cause in user["cost"] else "" for cause in causes),
        )
    console.print(table, highlight=False)
    share = sum(total["parts"][part] for part in useful) / (total["accelerator_hours"] or 1)
    console.print(Text(f"hours of all ranks; {share:.1%} of them went into training and evaluating that count", "dim"))
