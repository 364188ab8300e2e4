"""Who this process is: which rank, of how many, of which attempt, in which job."""

from dataclasses import dataclass

from outlast.slurm.environment import SlurmJob


@dataclass
class Identity:
    """One rank of one attempt."""

    rank: int
    world_size: int
    job: SlurmJob | None
    """The Slurm job around this process."""
    attempt: int
    """Number of the attempt, from 1. Without a job, only rank 0 knows it until the ranks are connected."""
