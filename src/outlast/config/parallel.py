"""Over how many processes a run is spread, and how."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from .section import Number, Section


@dataclass(kw_only=True)
class Parallel(Section):
    """Data parallel training: one process (rank) per accelerator, or per share of the CPU cores."""

    kind: str
    nodes: Annotated[int, Number(gt=0)] = 1
    """Machines."""
    ranks_per_node: Annotated[int, Number(gt=0)] = 1
    """Ranks (processes) on each machine."""
    cpus_per_rank: Annotated[int, Number(gt=0)] = 2
    """CPU cores of a rank, and its threads. The order of CPU sums depends on it: a change costs exactness."""
    gpus_per_rank: Annotated[int, Number(ge=0, le=1)] = 0
    """GPUs of a rank."""
    launch: Literal["srun", "accelerate"] = "srun"
    """What starts the ranks of a node: `srun`, one task per rank; or `accelerate launch`, as the node's one task."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def zero_stage(self) -> int:
        """Stage of DeepSpeed's ZeRO; 0 without DeepSpeed."""
        return 0


@dataclass(kw_only=True)
class Ddp(Parallel):
    """Data parallel: every rank holds the whole model."""

    kind: Literal["ddp"] = "ddp"


@dataclass(kw_only=True)
class Zero(Parallel):
    """Data parallel with DeepSpeed's ZeRO: each rank keeps only a part of the optimizer's state. `zero2` divides the
    gradients too, `zero3` also the weights; `zero3_offload` keeps its parts in the CPU's memory."""

    kind: Literal["zero1", "zero2", "zero3", "zero3_offload"] = "zero1"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's configuration. They may not contradict what follows from the other sections."""

    @property
    def zero_stage(self) -> int:
        return int(self.kind.removeprefix("zero")[0])

    @property
    def offload(self) -> bool:
        return self.kind.endswith("_offload")
