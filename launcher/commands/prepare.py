"""`outlast prepare`: what a user's own batch script is told."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from outlast.config.configuration import load
from outlast.errors import ConfigError, Exit
from outlast.rundir.directory import RunDirectory

from ..execution.freeze import freeze
from ..execution.sweep import prepare_cell
from ..planning.batch_script import shell_file, shell_python
from ..planning.compose import compose
from ..planning.plan import Plan, plan_run
from ..planning.sweep import plan_sweep
from ..runs.state import is_locked


def main(overrides: Sequence[str], config_dir: Path | None, *, sweep: bool, cell: int) -> int:
    """Make the run directory of a run, or of one cell of a sweep, and print its path."""
    if sweep:
        run = prepare_cell(plan_sweep(overrides, config_dir=config_dir), cell)
    else:
        run = _prepare(plan_run(compose(overrides, config_dir=config_dir)))
    print(run.path)
    return Exit.DONE


def _prepare(plan: Plan) -> RunDirectory:
    """Freeze the plan, unless an attempt is alive: it keeps the configuration that it has.

    Raises:
        ConfigError: that attempt has other values, which this job would take over.
    """
    run = plan.directory
    if not (is_locked(run) and run.config.exists()):
        return freeze(plan)
    changes = plan.config.all_differences(load(run.config))
    for key, (mine, its) in changes.items():
        reason = f"an attempt is alive on {run.path}, with {its!r}; the same command again when it has ended"
        raise ConfigError(key, mine, reason)
    return run


def prologue() -> int:
    """Print the first lines of a batch script, for its shell to evaluate."""
    print(f". {shlex.quote(str(shell_file('prologue.sh')))}; {shell_python()}")
    return Exit.DONE
