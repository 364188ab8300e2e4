"""What runs in every rank's process: `python -m outlast.rank RUN_DIR`, or `--sweep SWEEP_DIR` as a task of an array.

Catches signals first of all, reads the frozen configuration, runs the job that it names, and turns the outcome into
the exit code. With `parallel.launch=accelerate` the same command is one node's agent, which starts that node's ranks
(`agent.py`).
"""

import argparse
import importlib
import os
import signal
import sys
import traceback

from . import agent
from .config.configuration import load
from .errors import OutlastError, denied
from .preemption.repeats import exit_code_of
from .preemption.signals import PreemptionGuard
from .processes import PARENT_ENV, SIGNALS, die_with, ignore_output_errors
from .run import Run
from .rundir.attempts import finished
from .rundir.ledger import Ledger
from .slurm.environment import current_job
from .which_run import run_named_by, target_arguments


def main(arguments: argparse.Namespace) -> None:
    """Run one attempt, as one rank. An attempt that leaves early ends the process with exit code 75.

    Args:
        arguments: as `target_arguments` reads them.

    Raises:
        Exception: whatever the job raised, after it has been noted in the ledger.
    """
    guard = PreemptionGuard()
    guard.install()
    ignore_output_errors()
    die_with(agent.AGENT_ENV, signal.SIGKILL)  # it would not be waited for: better the last checkpoint than an orphan
    die_with(PARENT_ENV, signal.SIGTERM)
    run_directory = run_named_by(arguments)
    config = load(run_directory.config)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.parallel.cpus_per_rank))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run = Run(run_directory, guard, config.preemption, config.checkpoint, config.storage, guarding=config.guard)
    except Exception as error:
        _show(error)
        raise
    _log_by_attempt(run)
    run.describe(config=config.digest_of_any_ranks[:16])
    try:
        job = importlib.import_module(f"outlast.jobs.{config.job.name}")
        job.main(run, config)
        if run.rank == 0 and not finished(Ledger(run_directory.ledger).read()):
            raise OutlastError(f"job {config.job.name} returned without finishing its run")
        run.collectives.close()
    except Exception as error:
        _show(error)
        code = run.fail(error)
        sys.stderr.flush()
        if guard.requested is not None:
            os._exit(code)  # on its way out: nothing may hold it up
        raise


def _show(error: Exception) -> None:
    """Print where an error comes from, unless its message says all."""
    if not isinstance(error, OutlastError) and denied(error) is None:
        traceback.print_exc()


def _log_by_attempt(run: Run) -> None:
    """Send this rank's output to a log of this attempt, unless the local launcher has; the log of `srun`, or of the
    agent, keeps the pointer to it."""
    if current_job() is None and agent.AGENT_ENV not in os.environ:
        return
    path = run.directory.log(run.attempt, run.rank)
    run.say(f"log: {path}")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:  # a full disk
        print(f"[outlast] WARNING: rank {run.rank} has no log of its own: {error}", flush=True)
        return
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _command() -> int:
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the guard is in place
        arguments = target_arguments("outlast.rank").parse_args()
        if agent.AGENT_ENV not in os.environ:
            run = run_named_by(arguments)
            config = load(run.config)
            if config.parallel.launch == "accelerate":
                die_with(PARENT_ENV, signal.SIGTERM)
                os.environ.pop(PARENT_ENV, None)
                try:
                    agent.main(config, run.path, sys.argv[1:])
                except OutlastError:
                    raise
                except Exception:
                    traceback.print_exc()
                    raise
        main(arguments)
    except OutlastError as error:
        print(f"outlast: {error}", file=sys.stderr)
        return exit_code_of(error)
    except Exception as error:
        if text := denied(error):
            print(f"outlast: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_command())
