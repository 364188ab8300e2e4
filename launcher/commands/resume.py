"""`outlast resume`: what is unfinished goes on, also what failed, was cancelled or gave up."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from outlast.config.cluster import LocalCluster, SlurmCluster
from outlast.errors import ConfigError, Exit, SlurmError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.sweep import read_sweep_manifest

from ..execution import local
from ..execution.submit import LEAVING_S, POLL_S, submit
from ..execution.sweep import submit_sweep
from ..planning.expand import Combination
from ..planning.plan import Plan, plan_run
from ..planning.resume import changed
from ..planning.sweep import PlannedCell, SweepPlan
from ..runs import queue
from ..runs.find import is_named, is_writable, runs_named
from ..runs.standing import RunStatus, collect
from ..runs.state import State
from ..runs.submissions import sweep_at

LISTED = 12
"""Runs up to which each has a line; more are counted."""

LIMIT_S = 10.0


def main(arguments: Sequence[str], root: Path) -> int:
    """`outlast resume RUN|SWEEP|SWEEP/CELL… [OVERRIDE…]`.

    Everything is checked before the first run is submitted.

    Raises:
        ConfigError: a run that does not exist, or an override that is refused, with the reason.
        SlurmError: Slurm does not answer: whether a run is in the queue can't be known, so nothing is submitted.
    """
    names, overrides = sorted_out(arguments, root)
    rows = _settled(runs_named(names, root))
    for row in rows:
        if row.note is not None:
            raise SlurmError(f"{row.note}. Whether {row.name} is in the queue can't be known: nothing was submitted.")
    for row in rows:
        if not is_writable(row.directory.path):
            reason = f"it is {row.owner}'s, and you may not write there; a copy of the directory is a run of your own"
            raise ConfigError("RUN", row.name, reason)
        changed(row.directory, overrides)  # refused whatever the run is doing
    plans = {row.name: plan_of(row, overrides) for row in rows if _left_alone(row) is None}
    if overrides and not plans:
        _refuse_without_effect(rows, overrides)
    _print_left_alone(rows, "; the overrides have no effect there" if overrides else "")
    cells: dict[Path, list[Plan]] = defaultdict(list)
    for name, plan in plans.items():
        if not isinstance(plan.config.cluster, SlurmCluster):
            continue
        if sweep_at(plan.directory.path.parent) is not None:
            cells[plan.directory.path.parent].append(plan)
        else:
            job = submit(plan)
            print(f"{name}: " + (f"job {job.job_id} is in the queue already" if job.again else f"job {job.job_id}"))
    for directory, members in cells.items():
        _submit_cells(directory, members)
    code = _train_here([plan for plan in plans.values() if isinstance(plan.config.cluster, LocalCluster)])
    return code or (Exit.FAILED if any(map(_is_leaving, rows)) else Exit.DONE)


def _settled(runs: list[RunDirectory]) -> list[RunStatus]:
    """Where the runs stand. A job that is on its way out is waited for, within limits: it may end, or come back."""
    deadline = time.monotonic() + LEAVING_S
    while True:
        rows = collect(runs, ask=partial(queue.ask, limit_s=LIMIT_S))
        if not any(map(_is_leaving, rows)) or time.monotonic() > deadline:
            return rows
        time.sleep(POLL_S)


def _is_leaving(row: RunStatus) -> bool:
    return row.slurm_state == "COMPLETING" and row.state != State.FINISHED


def sorted_out(arguments: Sequence[str], root: Path) -> tuple[list[str], list[str]]:
    """Tell names of runs from overrides. A name may hold `=` (cells have such names), so what exists is a name.

    Raises:
        ConfigError: no run was named.
    """
    names = [text for text in arguments if "=" not in text or is_named(text, root)]
    if not names:
        raise ConfigError("RUN", " ".join(arguments), "valid: a run or a sweep, then overrides")
    return names, [text for text in arguments if text not in names]


def plan_of(row: RunStatus, overrides: Sequence[str]) -> Plan:
    """The plan of a run that is to go on.

    Raises:
        ConfigError: it is refused, with the reason.
    """
    config = changed(row.directory, overrides)
    if isinstance(config.cluster, LocalCluster) and row.job_id is not None:
        reason = "it was submitted with `sbatch`, whose script has its resources; valid: the same `sbatch` again"
        raise ConfigError("RUN", row.name, reason)
    return plan_run(config, with_script=row.sweep is None)


def _train_here(plans: list[Plan]) -> int:
    """Run one after the other in the foreground, until one is told to stop. Returns the worst exit code."""
    worst, console = int(Exit.DONE), Console(highlight=False)
    for plan in plans:
        code = local.train(plan, console)
        if code == Exit.RESUME_ME:
            return code
        worst = max(worst, code)
    return worst


def _left_alone(row: RunStatus) -> str | None:
    """Why a run is left alone; None if it is to go on."""
    if _is_leaving(row):
        return f"is on its way out (job {row.job_id}), and did not leave; try again when it has"
    match row.state:
        case State.FINISHED:
            return "has finished already"
        case State.RUNNING | State.QUEUED | State.PREEMPTED:
            job = "" if row.job_id is None else f" (job {row.job_id})"
            return f"{'waits for its requeue' if row.state == State.PREEMPTED else f'is {row.state} already'}{job}"
    if row.slurm_state in queue.ACTIVE:
        return f"is on its way out (job {row.job_id}); try again when it has left"
    return None


def _refuse_without_effect(rows: list[RunStatus], overrides: Sequence[str]) -> None:
    """Refuse overrides that no run would heed.

    Raises:
        ConfigError: with what each run is doing, and the way out.
    """
    first = rows[0]
    if first.state == State.FINISHED:
        way = "another run can go on from its model: outlast train model=pretrained model.path=RUN/final run.name=…"
    else:
        way = f"stop it first: outlast cancel {first.name}, then the same command"
    reason = f"no effect: {first.name} {_left_alone(first)}"
    more = f", and {len(rows) - 1} more are left alone" if len(rows) > 1 else ""
    raise ConfigError("override", " ".join(overrides), f"{reason}{more}; {way}")


def _print_left_alone(rows: list[RunStatus], no_effect: str) -> None:
    alone = [(row.name, reason) for row in rows if (reason := _left_alone(row)) is not None]
    if len(alone) <= LISTED:
        for name, reason in alone:
            print(f"{name} {reason}{no_effect}")
    else:
        for reason, count in Counter(reason.partition(" (")[0] for _, reason in alone).items():
            print(f"{count} of {len(rows)}: {reason}{no_effect}")


def _submit_cells(directory: Path, plans: list[Plan]) -> None:
    """Submit cells of one sweep, in one array."""
    manifest = read_sweep_manifest(directory)
    by_directory = {plan.directory.path.name: plan for plan in plans}
    planned = [
        PlannedCell(Combination(cell.name, tuple(cell.overrides)), by_directory[cell.directory])
        for cell in manifest.cells
        if cell.directory in by_directory
    ]
    again = SweepPlan(directory.name, directory.parent, manifest.overrides, planned)
    outcome = submit_sweep(again, reopen=True)
    for job in outcome.jobs:
        print(f"{directory.name}: {len(job.indices or ())} cells in array job {job.job_id}")
    if left := len(planned) - len(outcome.submitted):
        print(f"{directory.name}: {left} cells are in the queue already")
