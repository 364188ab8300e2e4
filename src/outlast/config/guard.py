"""What follows a loss that says that training is lost."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .section import Number, Section


@dataclass(kw_only=True)
class GuardSection(Section):
    """What follows a loss of training that is NaN or infinite, or that jumps."""

    action: Literal["stop", "report"] = "stop"
    """What follows: `stop` or `report`. `stop`: the run fails before a checkpoint of that step is made, and is not
    started again, since the same would come. `report`: a warning, and training goes on."""
    spike: Annotated[float, Number(gt=1)] | None = None
    """A loss this many times the median of the 50 steps before is treated alike; null: none is."""
