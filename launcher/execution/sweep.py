"""A sweep, submitted as one job array, or prepared cell by cell for a user's own.

The same command again finds the sweep by its name, adds cells that are new, and submits what is neither done nor in
the queue.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from outlast.config.configuration import load
from outlast.errors import ConfigError
from outlast.files import write_atomically
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.submission import Submission, submission_lock
from outlast.rundir.sweep import SWEEP_MANIFEST

from ..planning.plan import check_run_directory
from ..planning.sweep import PlannedCell, SweepPlan, check_budget, check_cells, merged
from ..runs.state import State, is_locked, state_of
from ..runs.submissions import mark_cancelled
from . import arrays, snapshot
from .freeze import freeze
from .submit import in_queue, take_code, undo, use_cluster

NOT_AGAIN = (State.FAILED, State.CANCELLED, State.GAVE_UP)
"""States of cells that have come to their end without being done. Submitting one again is a decision of the user's, and
has a command of its own, `outlast resume`."""
WRITERS = 16
"""Threads that write cells' directories: they wait for the disk, most of all on a shared file system."""


@dataclass
class SweepSubmission:
    """What a submission did: names of cells."""

    submitted: list[str] = field(default_factory=list)
    before: dict[str, State | None] = field(default_factory=dict)
    """Of every cell before: the state in which it was left alone, None if it was to be submitted."""
    jobs: list[Submission] = field(default_factory=list)
    """What was submitted now."""
    left_out: list[str] = field(default_factory=list)
    """What of the project was not copied."""
    unchanged: dict[str, list[str]] = field(default_factory=dict)
    """Of cells that are in the queue or done: keys that were asked for now and are other values there."""


def submit_sweep(sweep: SweepPlan, *, reopen: bool = False) -> SweepSubmission:
    """Submit the cells that are not done or queued, as one job array.

    It becomes several where it has more tasks than Slurm allows, or where cells differ in what they ask of Slurm.

    Args:
        reopen: submit also what failed, was cancelled or gave up.

    Raises:
        ConfigError: Slurm refuses; of what was not there before, nothing is left.
        SlurmError: Slurm does not answer. Cells whose array was accepted before that are in the queue.
    """
    use_cluster(sweep.cells[0].plan.config)
    record = sweep.directory / SWEEP_MANIFEST
    known = record.read_text() if record.exists() else None
    others = set(os.listdir(sweep.directory)) if sweep.directory.is_dir() else None
    make_sweep_directory(sweep)
    with submission_lock(sweep.directory) as lock:
        check_cells(sweep)
        manifest = merged(sweep)
        outcome = SweepSubmission(before=_states(sweep))
        left = {State.QUEUED, State.FINISHED, *(() if reopen else NOT_AGAIN)}
        todo = [cell for cell in sweep.cells if outcome.before[cell.name] not in left]
        for cell in sweep.cells:
            frozen = cell.plan.directory.config
            stays = outcome.before[cell.name] in left and frozen.is_file()
            if stays and (changes := cell.plan.config.all_differences(load(frozen))):
                outcome.unchanged[cell.name] = list(changes)
        if not todo:
            return outcome
        check_budget([cell.plan for cell in sweep.cells], manifest, code_bytes=snapshot.size(Path.cwd()))
        found = arrays.arrays_of(todo, manifest)
        _freeze(todo)
        # Cells that this command does not know of may wait, or run, with what was frozen for them.
        code = "code" if not manifest.submissions else f"code-{len(manifest.submissions) + 1}"
        outcome.left_out = take_code(todo[0].plan.config, sweep.target(code=code))
        for cells, indices, offset in found:
            target = sweep.target(code=code, offset=offset)
            try:
                done = arrays.submit(sweep, manifest, cells, indices, target, lock, len(found))
            except ConfigError:
                if not outcome.jobs:  # nothing is left that would look like a sweep, or like cells of it
                    undo(sweep.directory, others)
                    if known is not None:
                        write_atomically(record, known)
                raise
            outcome.jobs.append(done)
            outcome.submitted += [cell.name for cell in cells]
    return outcome


def _states(sweep: SweepPlan) -> dict[str, State | None]:
    runs = {cell.name: cell.plan.directory for cell in sweep.cells}
    states = {name: left_alone(run) for name, run in runs.items()}
    for path, (job_id, job) in in_queue([run for name, run in runs.items() if states[name] is None]).items():
        if job.active:
            states[path.name] = State.QUEUED
        elif job.state == "CANCELLED":  # by `scancel`, while it waited: Slurm forgets that, so it is written down
            mark_cancelled(runs[path.name], job_id)
            states[path.name] = State.CANCELLED
        else:
            states[path.name] = left_alone(runs[path.name])  # it may have been on its way out, and waited for
    return states


def left_alone(run: RunDirectory) -> State | None:
    """Give the state for which the same command leaves a cell alone; None: it is submitted."""
    state = state_of(run, Ledger(run.ledger).read())
    if state in (State.FINISHED, *NOT_AGAIN):
        return state
    # Held by a process of this host. A sign of life from another host may be an old one: there, Slurm is asked.
    return State.QUEUED if state == State.RUNNING and is_locked(run) else None


def make_sweep_directory(sweep: SweepPlan) -> None:
    """Make the sweep's directory, for its lock.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        (sweep.directory / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run.root", str(sweep.root), f"{error.filename}: {error.strerror}") from None


def _freeze(cells: Iterable[PlannedCell]) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for _ in pool.map(lambda cell: freeze(cell.plan), cells):
            pass


def prepare_cell(sweep: SweepPlan, index: int) -> RunDirectory:
    """Make the run directory of one cell, for a task of a user's own job array.

    Raises:
        ConfigError: there is no such cell.
    """
    if not 0 <= index < len(sweep.cells):
        count = len(sweep.cells)
        raise ConfigError("--cell", index, f"the sweep has {count} cells; valid: 0 to {count - 1} (sbatch --array)")
    make_sweep_directory(sweep)
    cell = sweep.cells[index]
    with submission_lock(sweep.directory):  # the other tasks do the same at this moment
        check_cells(sweep)
        merged(sweep).write(sweep.directory)
    if cell.plan.directory.config.exists():
        check_run_directory(cell.plan)
    else:
        freeze(cell.plan)
    return cell.plan.directory
