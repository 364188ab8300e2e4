"""The library in a user's own script: `run = outlast.start("runs/mine")`."""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .agent import AGENT_ENV
from .attempt.joining import AlreadyFinished
from .checkpoint.strangers import refuse_strangers
from .config.checkpoint import CheckpointSection
from .config.guard import GuardSection
from .config.preemption import PreemptionSection
from .config.section import require, section
from .config.storage import StorageSection
from .errors import ConfigError, OutlastError
from .finished_run import FinishedRun
from .preemption.repeats import exit_code_of
from .preemption.signals import PreemptionGuard
from .processes import at_parents_death, die_with, ignore_output_errors
from .ranks.meeting import use_private_store
from .ranks.started import ELASTIC_ENV, refuse_half_a_rank
from .run import Run
from .rundir.directory import RunDirectory


def start(
    directory: str | Path,
    *,
    every: int | str | None = None,
    milestone_every: int | None = None,
    budget_gb: float = 10.0,
    lead_s: int = 90,
    hang_s: float | None = 120.0,
    max_requeues: int = 1000,
    allow: Sequence[str] = (),
    requeue: bool = False,
    guard_action: str = "stop",
    guard_spike: float | None = None,
) -> Run:
    """Begin, or go on with, a run. Call it first: signals are caught from here on.

    An error of outlast that the script does not catch ends it with the message alone and the error's exit code. A
    script may have several runs, each in a directory of its own, one after the other. Of a run that has finished before
    it gets one that trains nothing: `run.train` loads `final/`, and the script goes on.

    Args:
        directory: the run directory; made if need be. On a cluster, on a file system that all nodes share.
        every: when to save: optimizer steps, a time (`"30min"`), or `"auto"`; None: a Trainer's own `save_steps`, and
            `"auto"` in a loop of your own.
        milestone_every: optimizer steps between checkpoints that are kept, without what only a resume needs.
        budget_gb: what the run directory may take, in GB (10^9 bytes).
        lead_s: seconds before the job's time limit at which to save and leave if no signal has come.
        hang_s: seconds without a sign of life from a rank after which the others leave; None: they wait for it.
        max_requeues: requeues after which the run gives up; after a crash the batch script's epilogue counts to 1000.
        allow: what may differ from the run that made the checkpoint: `dataset`, `seed`, `global_batch`, ...
        requeue: the Slurm job around this script is there for this run, and may be requeued. A job whose batch script
            is a copy of `slurm/script.sbatch` always may. Any other (an `salloc`, a notebook's) is left alone.
        guard_action: what follows a loss that is NaN or infinite: `stop`, before that is saved, or `report`.
        guard_spike: the same for a loss so many times the median of the 50 steps before; None: no matter how high.

    Raises:
        ConfigError: an argument is refused; this script has had a run in this directory, or has one under way; or it is
            a rank that a framework has started by itself (`launch.py` says how ranks are started).
        ResumeRefusedError: a Trainer without outlast has made checkpoints in this directory.
        RunBusyError: another attempt is alive on the directory.
        SlurmError: Slurm can't say where the first rank is.
        SystemExit: with code 93, the run gave up; with 75, the process was told to leave while it started.
    """
    _show_errors_as_messages()
    _check(directory, allow, requeue)
    run = RunDirectory(Path(directory).absolute())
    _refuse_twice(run.path)
    refuse_half_a_rank()
    refuse_strangers(run)
    guard = PreemptionGuard(interrupt=True)
    try:
        guard.install()
    except RuntimeError as error:
        valid = "valid: in the main thread, and when the run before it has ended (run.train or run.finish)"
        raise ConfigError("outlast.start", str(directory), f"{error}; {valid}") from None
    ignore_output_errors()
    by_torchrun = _end_with_starter()
    preemption = {"lead_s": lead_s, "hang_s": hang_s, "max_requeues": max_requeues}
    checkpoint = {"every": "auto" if every is None else every, "milestone_every": milestone_every, "allow": list(allow)}
    try:
        guarding = section("guard", GuardSection, {"action": guard_action, "spike": guard_spike})
        arguments = (
            run,
            guard,
            section("preemption", PreemptionSection, preemption),
            section("checkpoint", CheckpointSection, checkpoint),
            section("storage", StorageSection, {"budget_gb": budget_gb}),
        )
        try:
            started = Run(*arguments, guarding=guarding, loop_saves=every is None, requeue=requeue)
        except AlreadyFinished as done:
            if done.code:  # the other ranks wait for this one, and can't be told
                raise
            started = FinishedRun(*arguments, step=done.step, requeue=requeue)
    except BaseException:
        guard.uninstall()
        raise
    if by_torchrun:
        started.say(
            "started by torchrun, which ends with exit code 1 after TERM and kills ranks that save for over 30 s: "
            "`python -m outlast.launch --ranks N SCRIPT ...` ends with 75, and waits for them"
        )
    if "RANK" in os.environ:
        use_private_store()
    started.in_script = True
    _begun.add(run.path.resolve())
    return started


def _end_with_starter() -> bool:
    """Have a rank not train on unseen when its starter is gone; returns whether that is torchrun, or as it is."""
    die_with(AGENT_ENV, signal.SIGKILL)  # it would not be waited for: better the last checkpoint than an orphan
    by_torchrun = ELASTIC_ENV in os.environ and AGENT_ENV not in os.environ
    if by_torchrun:
        at_parents_death(signal.SIGTERM)
    return by_torchrun


def _check(directory: Any, allow: Any, requeue: Any) -> None:
    """Refuse arguments of another type, where a section of the configuration does not."""
    require(isinstance(directory, str | Path) and str(directory) != "", "outlast.start", directory, "valid: a path")
    require(not isinstance(allow, str), "allow", allow, "valid: a list of names")
    require(isinstance(requeue, bool), "requeue", requeue, "valid: true or false")


_begun: set[Path] = set()
"""The directories in which this process has had a run."""


def _refuse_twice(directory: Path) -> None:
    """Refuse a second run in one directory: what it trains would be left out, since the first has finished there."""
    if directory.resolve() in _begun and not hasattr(sys, "ps1"):  # in a notebook, a cell is run again
        valid = "valid: a directory of its own for each run of a script, which has begun one in this already"
        raise ConfigError("outlast.start", str(directory), valid)


def _show_errors_as_messages() -> None:
    """Have an error of outlast that nobody catches end the process as a command ends: no traceback, its exit code."""
    if isinstance(sys.excepthook, _Hook):  # a second run in this process
        return
    sys.excepthook = _Hook(sys.excepthook)


class _Hook:
    """A `sys.excepthook`, before the one that was there."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, OutlastError) or hasattr(sys, "ps1"):  # an interactive session goes on
            self._previous(kind, error, traceback)
            return
        # Not `sys.stderr`: torch's own hook, in ranks, has put a buffer there, which it drops if this one exits.
        with contextlib.suppress(OSError):
            print(f"outlast: {error}", file=sys.__stderr__ or sys.stderr, flush=True)
        sys.exit(int(exit_code_of(error)))
