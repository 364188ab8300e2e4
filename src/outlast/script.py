"""The library in a user's own script: `run = outlast.start("runs/mine")`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .config.checkpoint import CheckpointSection
from .config.preemption import PreemptionSection
from .config.section import section
from .config.storage import StorageSection
from .errors import OutlastError
from .preemption.signals import PreemptionGuard
from .processes import ignore_output_errors
from .ranks.meeting import use_private_store
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
) -> Run:
    """Begin, or go on with, a run. Call it first: signals are caught from here on.

    An error of outlast that the script does not catch ends it with the message alone and the error's exit code.

    Args:
        directory: the run directory; made if need be. On a cluster, on a file system that all nodes share.
        every: when to save: optimizer steps, a time (`"30min"`), or `"auto"`; None: a Trainer's own `save_steps`, and
            `"auto"` in a loop of your own.
        milestone_every: optimizer steps between checkpoints that are kept, without what only a resume needs.
        budget_gb: what the run directory may take, in GB (10^9 bytes).
        lead_s: seconds before the job's time limit at which to save and leave if no signal has come.
        hang_s: seconds without a sign of life from a rank after which the others leave; None: they wait for it.
        max_requeues: requeues after which the run gives up.
        allow: what may differ from the run that made the checkpoint: `dataset`, `seed`, `global_batch`, ...
        requeue: the Slurm job around this script is there for this run, and may be requeued. A job whose batch script
            is a copy of `slurm/script.sbatch` always may. Any other (an `salloc`, a notebook's) is left alone.

    Raises:
        ConfigError: an argument is refused.
        AlreadyFinished: (a `SystemExit` with code 0) the run has finished before.
        RunBusyError: another attempt is alive on the directory.
    """
    _show_errors_as_messages()
    guard = PreemptionGuard(interrupt=True)
    guard.install()
    ignore_output_errors()
    preemption = {"lead_s": lead_s, "hang_s": hang_s, "max_requeues": max_requeues}
    checkpoint = {"every": "auto" if every is None else every, "milestone_every": milestone_every, "allow": list(allow)}
    run = Run(
        RunDirectory(Path(directory).absolute()),
        guard,
        section("preemption", PreemptionSection, preemption),
        section("checkpoint", CheckpointSection, checkpoint),
        section("storage", StorageSection, {"budget_gb": budget_gb}),
        loop_saves=every is None,
        requeue=requeue,
    )
    if "RANK" in os.environ:
        use_private_store()
    return run


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
        print(f"outlast: {error}", file=sys.stderr, flush=True)
        sys.exit(int(error.exit_code))
