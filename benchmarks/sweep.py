"""Time to plan and submit sweeps of 10, 100 and 1,000 cells: `outlast train -m`, beside submitit's own job arrays.

    python benchmarks/sweep.py [--cells 10 100 1000] [--rounds 3] [--json]

Runs on a devcluster of its own (root, Debian's Slurm packages); the jobs are submitted on hold, so that nothing but the
submission is measured. submitit composes and checks nothing, and writes one pickle for each cell; outlast composes and
checks each cell's configuration and writes its run directory.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from figures import machine
from rich import box
from rich.console import Console
from rich.table import Table

from outlast.launcher.devcluster import cluster as devcluster
from outlast.launcher.execution.sweep import submit_sweep
from outlast.launcher.planning.sweep import plan_sweep

COUNTER = """#!/bin/bash
echo 1 >> {log}
exec {sbatch} "$@"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", default="smoke", help="smoke, or sft: its check imports TRL once, about 7 s")
    parser.add_argument("--json", action="store_true", help="print the values instead of the table")
    arguments = parser.parse_args()
    devcluster.require()
    directory = Path(tempfile.mkdtemp(prefix="outlast-benchmark-"))
    devcluster.up(directory / "cluster", say=lambda text: None)
    os.environ.update(devcluster.env(directory / "cluster"), OUTLAST_DEVCLUSTER=str(directory / "cluster"))
    log = _count_sbatch(directory)
    arms = {"outlast": lambda n, at: _outlast(n, at, arguments.job), "submitit": _submitit}
    rows = []
    try:
        for arm in arms.values():
            arm(2, directory / "warm-up")  # imports, and the first contact with the cluster
        for cells in arguments.cells:
            for number in range(arguments.rounds):
                for name, arm in arms.items():
                    rows.append({"arm": name, "cells": cells, "round": number})
                    rows[-1] |= _measured(arm, cells, directory / f"{name}-{cells}-{number}", log)
                    subprocess.run(["scancel", "--me"], check=True)
    finally:
        devcluster.down(directory / "cluster", say=lambda text: None)
        shutil.rmtree(directory, ignore_errors=True)
    report = {"machine": machine(Path(tempfile.gettempdir())), "job": arguments.job, "rows": rows}
    print(json.dumps(report, indent=1)) if arguments.json else Console().print(_table(report))


def _count_sbatch(directory: Path) -> Path:
    """Put an `sbatch` first on the PATH that writes a line for each call."""
    log, script = directory / "sbatch.log", directory / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(COUNTER.format(log=log, sbatch=shutil.which("sbatch")))
    script.chmod(0o755)
    os.environ["PATH"] = f"{script.parent}:{os.environ['PATH']}"
    return log


def _measured(arm: Callable[[int, Path], dict[str, float]], cells: int, at: Path, log: Path) -> dict[str, Any]:
    log.write_text("")
    seconds = arm(cells, at)
    files = sum(len(names) for _, _, names in os.walk(at))
    return seconds | {"sbatch_calls": len(log.read_text().splitlines()), "files": files}


def _outlast(cells: int, at: Path, job: str) -> dict[str, float]:
    overrides = [f"job={job}", "cluster=devcluster", "cluster.sbatch.hold=true", f"run.root={at}", "run.name=s"]
    overrides += [f"seed=range(0,{-(-cells // 2)})", "trainer.learning_rate=0.01,0.02"]
    before = time.perf_counter()
    plan = plan_sweep(overrides)
    planned = time.perf_counter()
    done = submit_sweep(plan)
    submitted = time.perf_counter()
    again = submit_sweep(plan_sweep(overrides))
    seconds = {"plan_s": planned - before, "submit_s": submitted - planned, "again_s": time.perf_counter() - submitted}
    assert len(done.submitted) == list(again.before.values()).count("queued") >= cells
    return seconds


def _submitit(cells: int, at: Path) -> dict[str, float]:
    import submitit

    executor = submitit.SlurmExecutor(folder=at)
    executor.update_parameters(time=60, additional_parameters={"hold": True})
    before = time.perf_counter()
    jobs = executor.map_array(_nothing, range(cells))
    assert len(jobs) == cells
    return {"submit_s": time.perf_counter() - before}


def _nothing(index: int) -> int:
    return index


def _table(report: dict[str, Any]) -> Table:
    here = report["machine"]
    title = f"{report['job']} cells on hold, medians; {here['date']}, {here['cores']} cores, {here['file_system']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("arm", "cells", "plan s", "submit s", "again s", "ms a cell", "sbatch calls", "files"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm, cells in dict.fromkeys((row["arm"], row["cells"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["arm"], row["cells"]) == (arm, cells)]
        middle = {key: median(row[key] for row in rows) for key in rows[0] if key not in ("arm", "round")}
        each = (middle.get("plan_s", 0.0) + middle["submit_s"]) / cells * 1000
        seconds = [f"{middle[key]:.2f}" if key in middle else "-" for key in ("plan_s", "submit_s", "again_s")]
        counts = [f"{middle['sbatch_calls']:.0f}", f"{middle['files']:.0f}"]
        table.add_row(arm, str(cells), *seconds, f"{each:.1f}", *counts)
    return table


if __name__ == "__main__":
    main()
