"""The report of a sweep: its cells with what is swept, their results and costs, and which override did what."""

import math
from pathlib import Path
from statistics import median
from typing import Any

from outlast.errors import ConfigError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.sweep import read_sweep_manifest

from .settings import lower_is_better, settings_of
from .state import state_of
from .summary import Summary, summarize

TRAINING_LOSS = "loss"
"""The metric of a cell in which nothing was evaluated."""
CURVE = 60
"""The most points of a cell's curve."""
COLUMNS = ("cell", "state", "metric", "step", "attempts", "preempted", "lost", "goodput", "hours", "time", "bytes")
"""What cells can be sorted by, beside the swept keys."""


def summarize_sweep(directory: Path) -> Summary:
    """Collect the report of a sweep as plain values; the schema stands in docs/report.md.

    Raises:
        OutlastError: the sweep's manifest can't be read.
    """
    manifest = read_sweep_manifest(directory)
    cells = [
        _cell(RunDirectory(directory / cell.directory), cell.name, cell.overrides)
        for cell in sorted(manifest.cells, key=lambda cell: cell.index)
    ]
    keys = list(dict.fromkeys(key for cell in cells for key in cell["overrides"]))
    evaluated = [cell for cell in cells if cell["metric"] and cell["metric"]["name"] != TRAINING_LOSS]
    scored = evaluated or [cell for cell in cells if cell["metric"]]
    lower = evaluated[0]["lower_is_better"] if evaluated else True
    best = min(scored, key=lambda cell: _signed(cell, lower), default=None)
    parts = [cell["parts"] for cell in cells if cell["parts"]]
    return {
        "sweep": directory.name,
        "path": str(directory),
        "keys": keys,
        "metric": best["metric"]["name"] if best else None,
        "lower_is_better": lower,
        "best": best["cell"] if best else None,
        "states": {state: sum(cell["state"] == state for cell in cells) for state in {c["state"] for c in cells}},
        "accelerator_hours": sum(cell["accelerator_hours"] for cell in cells),
        "parts": {name: sum(one[name] for one in parts) for name in (parts[0] if parts else ())},
        "cost": _sum_of_costs(cells),
        "effects": _effects(keys, scored),
        "cells": cells,
    }


def sort_cells(summary: Summary, column: str | None) -> list[Summary]:
    """The cells in the order of a column: `metric` (the best first, if none is named), a swept key, ...

    Args:
        column: with `-` in front, the largest first. Cells without a value come last.

    Raises:
        ConfigError: there is no such column.
    """
    name, down = (column or "metric").removeprefix("-"), (column or "").startswith("-")
    if name not in (*COLUMNS, *summary["keys"]):
        raise ConfigError("--sort", name, [*COLUMNS, *summary["keys"]])
    if name == "metric":
        down ^= not summary["lower_is_better"]
    values = [(value_of(cell, name), cell) for cell in summary["cells"]]
    if any(isinstance(value, str) for value, _ in values):
        values = [(None if value is None else str(value), cell) for value, cell in values]
    known = sorted(((v, c) for v, c in values if v is not None), key=lambda pair: pair[0], reverse=down)
    return [cell for _, cell in known] + [cell for value, cell in values if value is None]


def value_of(cell: Summary, column: str) -> Any:
    """The value by which a cell is sorted: a number where it is one."""
    if column == "metric":
        return cell["metric"]["value"] if cell["metric"] else None
    names = {"preempted": "preemptions", "lost": "steps_lost", "hours": "accelerator_hours", "time": "wall_s",
             "bytes": "bytes_used"}  # fmt: skip
    if column in COLUMNS:
        return cell[names.get(column, column)]
    return as_number(cell["overrides"].get(column))


def as_number(text: str | None) -> float | str | None:
    """What an override sets, as a number if it is a finite one."""
    try:
        value = math.nan if text is None else float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _cell(run: RunDirectory, name: str, overrides: list[str]) -> Summary:
    events, settings = Ledger(run.ledger).read(), settings_of(run)
    row: Summary = {
        "cell": name,
        "overrides": {key.lstrip("+~"): value for key, _, value in (text.partition("=") for text in overrides)},
        "metric": None,
        "lower_is_better": lower_is_better(settings["trainer"]),
        "step": 0,
        "total_steps": None,
        "attempts": 0,
        "preemptions": 0,
        "steps_lost": 0,
        "goodput": None,
        "wall_s": None,
        "accelerator_hours": 0.0,
        "bytes_used": None,
        "parts": {},
        "cost": {},
        "curve": [],
    }
    try:
        summary = summarize(run, events, settings)
    except ConfigError:  # it has not started
        return row | {"state": state_of(run, events)}
    losses, best = summary["curves"]["losses"], summary["best"]
    row["metric"] = best
    if best is None and losses and losses[-1][1] is not None:  # nothing is evaluated: the last training loss
        row["metric"] = {"name": TRAINING_LOSS, "value": losses[-1][1], "step": losses[-1][0]}
    points = summary["curves"]["evaluations"] if best else losses
    accounting = summary["accounting"]
    names = ("state", "step", "total_steps", "preemptions", "steps_lost", "goodput", "bytes_used")
    return row | {name: summary[name] for name in names} | {
        "attempts": len(summary["attempts"]),
        "wall_s": accounting["wall_s"],
        "accelerator_hours": accounting["accelerator_hours"],
        "parts": accounting["parts"],
        "cost": accounting["cost"],
        "curve": points[:: -(-len(points) // CURVE) or 1],
    }  # fmt: skip


def _signed(cell: Summary, lower: bool) -> float:
    return float(cell["metric"]["value"]) * (1 if lower else -1)


def _sum_of_costs(cells: list[Summary]) -> Summary:
    """What each cause has cost all cells together."""
    costs: Summary = {}
    for cell in cells:
        for cause, cost in cell["cost"].items():
            entry = costs.setdefault(cause, dict.fromkeys(cost, 0.0))
            for name, value in cost.items():
                entry[name] += value
    return costs


def _effects(keys: list[str], scored: list[Summary]) -> list[Summary]:
    """For each swept key, the metric of the cells by its value; the key with the largest differences first."""
    found = []
    for key in keys:
        by_value: dict[str, list[float]] = {}
        for cell in scored:
            if key in cell["overrides"]:
                by_value.setdefault(cell["overrides"][key], []).append(cell["metric"]["value"])
        values: list[Summary] = [
            {"value": value, "cells": len(of), "median": median(of), "least": min(of), "most": max(of)}
            for value, of in by_value.items()
        ]
        if len(values) > 1:
            medians = [value["median"] for value in values]
            found.append({"key": key, "difference": max(medians) - min(medians), "values": values})
    return sorted(found, key=lambda effect: -effect["difference"])
