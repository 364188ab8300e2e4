"""When an attempt leaves, and how often the run comes back."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .section import Number, Section


@dataclass(kw_only=True)
class PreemptionSection(Section):
    """When to leave, and how often to come back."""

    signal: Literal["USR1", "USR2", "TERM"] = "USR1"
    """Signal that Slurm sends `lead_s` before the time limit. All three mean "save and leave", whoever sends them."""
    lead_s: Annotated[int, Number("seconds", ge=5)] = 90
    """Seconds before the time limit at which the signal comes, and at which the job acts by its own clock."""
    grace_s: Annotated[float, Number("seconds", ge=0)] | None = None
    """Seconds from a preemption's signal to the kill; null: what Slurm says of the partition or QOS (`GraceTime`)."""
    hang_s: Annotated[float, Number("seconds", ge=2)] | None = 120.0
    """Seconds without a sign of life from a rank until the others end the attempt; null: they wait."""
    requeue_delay_s: Annotated[int, Number("seconds", ge=1)] = 5
    """Seconds from the requeue to the next start; left to itself, Slurm would hold the job for two minutes."""
    max_requeues: Annotated[int, Number(ge=0)] = 1000
    """Requeues after which the run gives up (exit code 93)."""
    max_crashes: Annotated[int, Number(ge=0)] = 2
    """Crashes in a row, without a new checkpoint in between, that are retried; one more fails the run."""
