"""The one place of the library that knows Slurm. No `SLURM_*` name and no Slurm command stands anywhere else in it."""

from .actions import Requeued, bring_forward, max_array_size, requeue, sbatch
from .commands import run, timestamp
from .environment import (
    SlurmJob,
    Step,
    address_of,
    current,
    environment_without_job,
    export_ranks,
    hostnames,
    node,
    step,
)
from .view import (
    STATE_CAUSES,
    JobView,
    Notice,
    accounted_state,
    end_time,
    notice,
    ran_out_of_memory,
    restart_cause,
    show_job,
)

__all__ = [
    "STATE_CAUSES",
    "JobView",
    "Notice",
    "Requeued",
    "SlurmJob",
    "Step",
    "accounted_state",
    "address_of",
    "bring_forward",
    "current",
    "end_time",
    "environment_without_job",
    "export_ranks",
    "hostnames",
    "max_array_size",
    "node",
    "notice",
    "ran_out_of_memory",
    "requeue",
    "restart_cause",
    "run",
    "sbatch",
    "show_job",
    "step",
    "timestamp",
]
