"""`outlast plan`: what `outlast train` would decide, printed; nothing is started."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outlast.errors import Exit
from outlast.files import to_json
from outlast.storage.budget import gb

from ..planning.compose import compose
from ..planning.plan import plan_run
from ..planning.sweep import SweepPlan, check_cells, plan_sweep


def main(overrides: Sequence[str], config_dir: Path | None, *, sweep: bool, as_json: bool) -> int:
    """`outlast plan`, for one run or for the cells of a sweep."""
    if sweep:
        cells = plan_sweep(overrides, config_dir=config_dir)
        check_cells(cells)
        return _print_sweep(cells, as_json=as_json)
    values = plan_run(compose(overrides, config_dir=config_dir)).as_dict()
    if as_json:
        print(to_json(values, indent=1))
        return Exit.DONE
    script, engine = values.pop("script"), values["training"].pop("deepspeed", None)
    values["checkpoint"] = values["checkpoint"]["explanation"]
    values["storage"] = f"\n{'':11}".join(_storage_lines(values["storage"]))
    values["hazards"] = f"\n{'':11}".join(values["hazards"])
    for key, value in values.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value or "none"
        print(f"{key:10} {shown}")
    if engine:
        print(f"deepspeed  {json.dumps(engine)}")
    _print_script(script)
    return Exit.DONE


def _print_sweep(sweep: SweepPlan, *, as_json: bool) -> int:
    script = sweep.script()
    if as_json:
        cells = [
            {"name": cell.name, "overrides": list(cell.combination.overrides), **cell.plan.as_dict()}
            for cell in sweep.cells
        ]
        print(to_json({"sweep": str(sweep.directory), "script": script, "cells": cells}, indent=1))
        return Exit.DONE
    print(f"sweep      {sweep.directory}")
    for cell in sweep.cells:
        print(f"cell       {cell.name}")
    for hazard in sweep.hazards:
        print(f"hazard     {hazard}")
    _print_script(script)
    return Exit.DONE


def _print_script(script: str | None) -> None:
    if script:
        print("script\n" + "\n".join(f"    {line}" for line in script.splitlines()))


def _storage_lines(storage: dict[str, Any]) -> list[str]:
    """Describe the storage part of a plan in lines of text."""
    lines = [f"budget {storage['budget_gb']:g} GB"]
    if "parts" not in storage:
        return lines
    kept, peak = storage["save_total_limit"], gb(storage["peak_bytes"])
    lines[0] += f" (smallest that would do: {storage['smallest_budget_gb']:g} GB); "
    lines[0] += f"up to {kept} whole checkpoint{'s' * (kept != 1)} kept, {peak} at most with a save in flight"
    parts, names = storage["parts"], ("checkpoint", "final", "fixed")
    rows: list[tuple[str, ...]] = [("", *names)]
    for part in dict.fromkeys(part for name in names for part in parts[name]):
        rows.append((part, *(gb(parts[name][part]) if part in parts[name] else "" for name in names)))
    rows.append(("in all", *(gb(storage[f"{name}_bytes"]) for name in names)))
    return lines + _table(rows) + [f"{here['kind']}: {gb(here['free_bytes'])} left" for here in storage["file_system"]]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
