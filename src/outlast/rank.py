"""What runs in every rank's process: `python -m outlast.rank RUN_DIR`, or :func:`main` called by submitit.

Catches signals first of all, reads the frozen configuration, runs the job that it names, and turns the outcome into
the exit code.
"""

import ctypes
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from . import slurm
from .config import load
from .errors import OutlastError
from .ledger import Ledger, finished
from .preemption import PreemptionGuard
from .run import AlreadyFinished, Run
from .rundir import RunDirectory

PARENT_ENV = "OUTLAST_PARENT"
_PR_SET_PDEATHSIG = 1


def main(directory: str) -> dict[str, Any]:
    """Run one attempt, as one rank.

    Returns:
        What submitit hands to `job.result()`: `{"step": ..., "final": ...}`. An attempt that leaves early does not
        return: the process ends with exit code 75 and writes no result.

    Raises:
        Exception: whatever the job raised, after it has been noted in the ledger.
    """
    guard = PreemptionGuard()
    guard.install()
    _die_with_parent()
    run_directory = RunDirectory(Path(directory))
    config = load(run_directory.config)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.parallel.cpus_per_rank))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run = Run(run_directory, guard, config.preemption, config.checkpoint, config.storage)
    except AlreadyFinished as done:
        return {"step": done.step, "final": str(run_directory.final)}
    _log_by_attempt(run)
    run.describe(config=config.digest[:16])
    try:
        job = importlib.import_module(f"outlast.jobs.{config.job.name}")
        job.main(run, config)
        if run.rank == 0 and not finished(Ledger(run_directory.ledger).read()):
            raise OutlastError(f"job {config.job.name} returned without finishing its run")
    except Exception as error:
        traceback.print_exc()
        code = run.fail(error)
        sys.stderr.flush()
        if guard.requested is not None:
            os._exit(code)  # on its way out: nothing may hold it up, and submitit must not take it for a result
        raise
    return {"step": run.progress.now.step, "final": str(run.final)}


def _log_by_attempt(run: Run) -> None:
    """On Slurm, send this rank's output to a log of this attempt; `srun`'s own log keeps the pointer to it."""
    if slurm.current() is None:
        return
    path = run.directory.log(run.attempt, run.rank)
    run.say(f"log: {path}")
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _die_with_parent() -> None:
    """Under the local launcher: if it is killed, be told (TERM), save, and leave, instead of training on unseen."""
    parent = os.environ.get(PARENT_ENV)
    if parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            signal.raise_signal(signal.SIGTERM)  # it went before we asked


def _command() -> int:
    if len(sys.argv) != 2:
        print(
            "usage: python -m outlast.rank RUN_DIR (one process per rank; started by `outlast train`)", file=sys.stderr
        )
        return 2
    try:
        main(sys.argv[1])
    except OutlastError as error:
        print(f"outlast: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_command())
