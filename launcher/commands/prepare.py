"""`outlast prepare`: what a user's own batch script is told."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from outlast.errors import Exit

from ..execution.freeze import freeze
from ..execution.sweep import prepare_cell
from ..planning.batch_script import shell_file, shell_python
from ..planning.compose import compose
from ..planning.plan import plan_run
from ..planning.sweep import plan_sweep


def main(overrides: Sequence[str], config_dir: Path | None, *, sweep: bool, cell: int) -> int:
    """Make the run directory of a run, or of one cell of a sweep, and print its path."""
    if sweep:
        run = prepare_cell(plan_sweep(overrides, config_dir=config_dir), cell)
    else:
        run = freeze(plan_run(compose(overrides, config_dir=config_dir)))
    print(run.path)
    return Exit.DONE


def prologue() -> int:
    """Print the first lines of a batch script, for its shell to evaluate."""
    print(f". {shlex.quote(str(shell_file('prologue.sh')))}; {shell_python()}")
    return Exit.DONE
