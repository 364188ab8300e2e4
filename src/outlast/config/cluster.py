"""Where a run runs."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from .section import Number, Section


@dataclass(kw_only=True)
class LocalCluster(Section):
    """This machine, in the foreground."""

    kind: Literal["local"] = "local"
    requeue_delay_s: Annotated[float, Number("seconds", ge=0)] = 1.0
    """Seconds between an attempt that was preempted and the next."""
    parallel_cells: Annotated[int, Number(gt=0)] = 1
    """Cells of a sweep that run at a time."""


@dataclass(kw_only=True)
class SlurmCluster(Section):
    """A Slurm cluster. What is null is not passed on, so the site's default holds."""

    kind: Literal["slurm", "devcluster"] = "slurm"
    partition: str | None = None
    """Partition to submit to (`--partition`)."""
    account: str | None = None
    """Account that is charged (`--account`)."""
    qos: str | None = None
    """Quality of service (`--qos`)."""
    time_min: Annotated[int, Number("minutes", gt=0)] = 60
    """Time limit of one attempt, in minutes (`--time`)."""
    mem_gb: Annotated[float, Number("GB", gt=0)] | None = None
    """Memory of a node that the job takes, in GB (`--mem`)."""
    constraint: str | None = None
    """Features that the nodes must have (`--constraint`)."""
    nodelist: str | None = None
    """Nodes to run on (`--nodelist`)."""
    exclude: str | None = None
    """Nodes to stay away from (`--exclude`)."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before `srun`: `module load ...`, `export ...`. One that fails ends the job; `... || true` may."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Any other `sbatch` flag, without the dashes: `cluster.sbatch.reservation=x`."""
    srun: dict[str, Any] = field(default_factory=dict)
    """Any further `srun` flag, without the dashes: `cluster.srun.cpu-bind=cores`."""
    code_limit_mb: Annotated[float, Number("MB", gt=0)] = 100.0
    """MB (10^6 bytes) that your project's files may take, which are copied when the run is submitted."""
    array_parallelism: Annotated[int, Number(gt=0)] | None = None
    """Cells of a sweep that run at a time; null: as many as Slurm has room for."""
