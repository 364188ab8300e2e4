"""outlast: fine-tuning jobs that outlast preemption on Slurm.

A user's own script needs three names: :func:`outlast.start`, :class:`outlast.Run` and the errors.
Importing the package imports no torch; that happens where training begins.
"""

from .errors import ConfigError, OutlastError, RunBusyError, SlurmError
from .run import Run
from .script import start

__all__ = ["ConfigError", "OutlastError", "Run", "RunBusyError", "SlurmError", "start"]
