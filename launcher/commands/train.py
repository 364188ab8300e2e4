"""`outlast train`: one run, or the cells of a sweep; here, or submitted."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from outlast.config.configuration import load
from outlast.config.trainer_keys import LENGTH
from outlast.errors import Exit
from outlast.files import to_json
from outlast.rundir.attempts import finished
from outlast.rundir.ledger import Ledger

from ..execution.fork import compose_fork
from ..execution.sweep import NOT_AGAIN, SweepSubmission, submit_sweep
from ..execution.wait import wait
from ..planning.compose import compose
from ..planning.plan import Plan, check_run_directory, plan_run
from ..planning.sweep import SweepPlan, plan_sweep, shown
from ..runs.results import Result, exit_code, metric_text, result
from ..runs.state import State

WARNINGS = 5
"""Lines at most: each cell of a sweep may have one of its own."""


def train(
    overrides: Sequence[str],
    config_dir: Path | None,
    *,
    waiting: bool,
    as_json: bool,
    begin_with: str | None = None,
    optimizer: bool = False,
) -> int:
    """`outlast train`: the exit code of the command.

    Args:
        begin_with: `--from`: the run, and which of its checkpoints, that this one begins with.
        optimizer: take over all of that checkpoint.
    """
    fork, said = None, list[str]()
    if begin_with is None:
        config = compose(overrides, config_dir=config_dir)
    else:
        config, fork, said = compose_fork(begin_with, overrides, config_dir=config_dir, optimizer=optimizer)
    plan = plan_run(config, fork=fork)
    check_run_directory(plan)
    run, console = plan.directory, _console(as_json)
    for text in said:
        console.print(text)
    _warn(plan.hazards, console)
    if done := finished(Ledger(run.ledger).read()):
        model = f"its model is in {run.final}" if run.final.is_dir() else f"its model is no longer in {run.final}"
        console.print(f"{run.path} has finished already, at step {done['step']}; {model}")
        if changes := plan.config.all_differences(load(run.config)):
            console.print("no effect on a run that has finished: " + ", ".join(changes))
            if {key.removeprefix("trainer.") for key in changes} & set(LENGTH):
                console.print(
                    f"to go on from it: outlast train --from {shlex.quote(str(run.path))} --optimizer run.name=… …"
                )
    elif plan.config.cluster.kind == "local":
        from ..execution import local

        code = local.train(plan, console)
        if not as_json:
            return code
    else:
        _submit(plan, console)
        if not waiting:
            return Exit.DONE
    if not (waiting or as_json):
        return Exit.DONE
    return _ended(lambda: [result(row) for row in wait([run], console)], console, as_json=as_json)


def _warn(hazards: list[str], console: Console) -> None:
    for hazard in hazards[:WARNINGS]:
        console.print(f"warning: {hazard}")
    if more := hazards[WARNINGS:]:
        console.print(f"warning: and {len(more)} more; `outlast plan` has them all")


def _submit(plan: Plan, console: Console) -> None:
    from ..execution.submit import submit

    job = submit(plan)
    name, root = plan.config.run.name, plan.config.run.root
    console.print(f"job {job.job_id} is in the queue already" if job.again else f"submitted job {job.job_id}")
    _say_left_out(job.left_out, console)
    name, root = shlex.quote(str(name)), shlex.quote(root)
    console.print(f"  run     {plan.directory.path}\n  log     {job.log}")
    console.print(f"  status  outlast status --root {root}\n  report  outlast report {name} --root {root}")
    console.print(f"  cancel  outlast cancel {name} --root {root}")


def train_sweep(overrides: Sequence[str], config_dir: Path | None, *, waiting: bool, as_json: bool) -> int:
    """`outlast train -m`: the exit code of the command."""
    sweep, console = plan_sweep(overrides, config_dir=config_dir), _console(as_json)
    _warn(sweep.hazards, console)
    if sweep.kind != "local":
        _describe(sweep, submit_sweep(sweep), console)
        if not (waiting or as_json):
            return Exit.DONE
    return _ended(lambda: _to_the_end(sweep, console), console, as_json=as_json)


def run_sweep(overrides: Sequence[str], *, config_dir: Path | None = None) -> list[Result]:
    """Run a sweep to its end, for a program that chooses what to try next.

    What has been run before is not run again; a call that was interrupted goes on when it is made again.

    Args:
        overrides: as `outlast train -m` takes them: `["trainer.learning_rate=1e-4,3e-4", "cluster=slurm"]`.
        config_dir: a directory of the user's own groups and experiments.

    Returns:
        One result for each cell, in the order of the sweep's product; `metric` is None for a cell without any.

    Raises:
        ConfigError, CellsRefusedError: refused; nothing was started.
        SlurmError: Slurm does not answer, or refuses the array.
    """
    sweep, console = plan_sweep(overrides, config_dir=config_dir), _console(True)
    if sweep.kind != "local":
        _describe(sweep, submit_sweep(sweep), console)
    return _to_the_end(sweep, console)


def _to_the_end(sweep: SweepPlan, console: Console) -> list[Result]:
    if sweep.kind == "local":
        from ..execution import local_sweep

        rows = local_sweep.run(sweep, console)
    else:
        rows = wait([cell.plan.directory for cell in sweep.cells], console)
    return [result(row, cell.combination.overrides) for row, cell in zip(rows, sweep.cells, strict=True)]


def _describe(sweep: SweepPlan, outcome: SweepSubmission, console: Console) -> None:
    for job in outcome.jobs:
        console.print(f"submitted job array {job.job_id}, {len(job.indices or ())} cells")
    _say_left_out(outcome.left_out, console)
    if not outcome.jobs:
        console.print("nothing to submit")
    for state, text in ((State.QUEUED, "in the queue already"), (State.FINISHED, "finished already")):
        if count := sum(one == state for one in outcome.before.values()):
            console.print(f"  {count} {text}")
    if outcome.unchanged:
        keys = ", ".join(dict.fromkeys(key for changes in outcome.unchanged.values() for key in changes))
        console.print(f"  no effect on {len(outcome.unchanged)} of them, which keep what they have: {keys}")
    name, root = shlex.quote(sweep.name), shlex.quote(str(sweep.root))
    for state in NOT_AGAIN:
        if names := [name for name, one in outcome.before.items() if one == state]:
            text = f"  {len(names)} {state.replace('_', ' ')}: {shown(names)}"
            console.print(f"{text}\n          to go on with them: outlast resume {name} --root {root}")
    console.print(f"  sweep   {sweep.directory}")
    console.print(f"  status  outlast status {name} --root {root}")
    console.print(f"  cancel  outlast cancel {name} --root {root}")


def _say_left_out(left_out: Sequence[str], console: Console) -> None:
    if left_out:
        console.print(f"  not copied, since it may hold a secret: {shown(list(left_out))}")


def _ended(results: Callable[[], list[Result]], console: Console, *, as_json: bool) -> int:
    """Wait, then report; Ctrl-C ends only the waiting."""
    try:
        return _report(results(), console, as_json=as_json)
    except KeyboardInterrupt:
        console.print("What was submitted goes on. The same command waits for it again.")
        return Exit.RESUME_ME


def _report(results: list[Result], console: Console, *, as_json: bool) -> int:
    """Print what came of each, and give the exit code that says it."""
    if as_json:
        print(to_json([one.as_dict() for one in results], indent=1))
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for header in ("cell", "state", "step", "metric"):
            table.add_column(header, overflow="fold")
        for one in results:
            table.add_row(one.name, one.state.replace("_", " "), str(one.step), metric_text(one))
        console.print(table)
    return exit_code(results)


def _console(to_stderr: bool) -> Console:
    """Open the console: standard error where standard output is for JSON alone, lines of any length off a terminal."""
    return Console(stderr=to_stderr, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
