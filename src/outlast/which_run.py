"""The run that a command line names, or the cell of a sweep that an array task works on."""

import argparse
from pathlib import Path

from .errors import OutlastError
from .rundir.directory import RunDirectory
from .rundir.sweep import SWEEP_MANIFEST, read_sweep_manifest
from .slurm.environment import current_job


def target_arguments(program: str) -> argparse.ArgumentParser:
    """The command line that names a run: its directory, or its sweep's and the array task around this process."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", allow_abbrev=False)
    parser.add_argument("directory", nargs="?", type=Path, metavar="RUN_DIR")
    parser.add_argument("--sweep", type=Path, metavar="SWEEP_DIR", help="the cell is that of this array task")
    parser.add_argument("--offset", type=int, default=0, help="a cell's index less its task in the array")
    return parser


def run_named_by(arguments: argparse.Namespace) -> RunDirectory:
    """The run that :func:`target_arguments` name.

    Raises:
        OutlastError: none is named, or the sweep has no such cell.
    """
    if (arguments.directory is None) == (arguments.sweep is None):
        raise OutlastError("valid: RUN_DIR, or --sweep SWEEP_DIR (started by `outlast train`)")
    return RunDirectory(arguments.directory or cell_directory(arguments.sweep, arguments.offset))


def cell_directory(sweep: Path, offset: int = 0) -> Path:
    """The run directory of the array task that this process belongs to.

    Raises:
        OutlastError: this is no task of an array, or the sweep has no such cell.
    """
    job = current_job()
    task = job.job_id.partition("_")[2] if job else ""
    if not task:
        raise OutlastError(f"{sweep} is a sweep: it runs as a job array, and this is no task of one")
    for cell in read_sweep_manifest(sweep).cells:
        if cell.index == int(task) + offset:
            return sweep / cell.directory
    raise OutlastError(f"{sweep / SWEEP_MANIFEST} has no cell {int(task) + offset}")
