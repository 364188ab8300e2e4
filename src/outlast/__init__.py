"""outlast: fine-tuning jobs that outlast preemption on Slurm.

A user's own script needs three names: :func:`outlast.start`, :class:`outlast.Run` and the errors, whose base is
:class:`outlast.OutlastError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attempt.joining import AlreadyFinished
    from .checkpoint.manifest import Sealed
    from .errors import CheckpointError, ConfigError, Exit, OutlastError, ResumeRefusedError, RunBusyError, SlurmError
    from .finished_run import FinishedRun
    from .ranks.layout import Layout
    from .run import Run
    from .script import start

__all__ = [
    "AlreadyFinished",
    "CheckpointError",
    "ConfigError",
    "Exit",
    "FinishedRun",
    "Layout",
    "OutlastError",
    "ResumeRefusedError",
    "Run",
    "RunBusyError",
    "Sealed",
    "SlurmError",
    "start",
]

_ERRORS = ("CheckpointError", "ConfigError", "Exit", "OutlastError", "ResumeRefusedError", "RunBusyError", "SlurmError")
_WHEN_ASKED_FOR = {"AlreadyFinished": ".attempt.joining", "Run": ".run", "start": ".script"}
_WHEN_ASKED_FOR |= {"FinishedRun": ".finished_run", "Layout": ".ranks.layout", "Sealed": ".checkpoint.manifest"}
_WHEN_ASKED_FOR |= dict.fromkeys(_ERRORS, ".errors")
"""Names whose modules are imported at their first use: the `outlast` command needs none of them to start."""


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHEN_ASKED_FOR[name], __name__), name)
