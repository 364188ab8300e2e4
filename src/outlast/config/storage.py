"""What a run may take of the disk."""

from dataclasses import dataclass
from typing import Annotated

from .section import Number, Section


@dataclass(kw_only=True)
class StorageSection(Section):
    """What the run may take of the disk."""

    budget_gb: Annotated[float, Number("GB", gt=0)] = 10.0
    """GB (10^9 bytes) that the run directory may take, a save in flight included."""
    sweep_budget_gb: Annotated[float, Number("GB", gt=0)] | None = None
    """GB that all cells of a sweep may take together; what finished cells don't use goes to the others. Null: each
    cell has `budget_gb`, whatever the others take."""
    reserve: bool = False
    """True: set aside the bytes of one checkpoint inside the budget, for an emergency save on a full disk."""

    @property
    def budget_bytes(self) -> int:
        return int(self.budget_gb * 1e9)

    @property
    def sweep_budget_bytes(self) -> int | None:
        return None if self.sweep_budget_gb is None else int(self.sweep_budget_gb * 1e9)
