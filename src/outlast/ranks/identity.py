"""Who this process is: which rank, of how many, of which attempt, in which job."""

from dataclasses import dataclass

from outlast.slurm.environment import SlurmJob


@dataclass
class Identity:
    """One rank of one attempt."""

    rank: int
    world_size: int
    job: SlurmJob | None
    """The Slurm job that is there for this run, and may be requeued."""
    attempt: int
    """Number of the attempt, from 1. Without a job, only rank 0 knows it until the ranks are connected."""
    around: SlurmJob | None = None
    """The Slurm job around this process, the run's or not: its time limit holds."""

    def __post_init__(self) -> None:
        self.around = self.around or self.job
