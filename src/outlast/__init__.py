"""outlast: fine-tuning jobs that outlast preemption on Slurm.

A user's own script needs three names: :func:`outlast.start`, :class:`outlast.Run` and the errors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, OutlastError, RunBusyError, SlurmError

if TYPE_CHECKING:
    from .run import Run
    from .script import start

__all__ = ["ConfigError", "OutlastError", "Run", "RunBusyError", "SlurmError", "start"]

_WHEN_ASKED_FOR = {"Run": ".run", "start": ".script"}
"""Names whose modules are imported at their first use: the `outlast` command needs none of them to start."""


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHEN_ASKED_FOR[name], __name__), name)
