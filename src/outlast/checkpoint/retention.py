"""Decides which checkpoints may go, how and in what order, without touching a disk.

There are four kinds:

- the **newest** that can be resumed from, which never goes; an emergency checkpoint is the newest until it has a
  sealed successor, and the store verifies that successor before it lets the last verified checkpoint go;
- the **best** by the metric: it may become light, and goes only for an emergency save;
- **milestones**, kept for evaluation: they become light;
- all **others**, which serve to resume from if a newer one does not verify: they are deleted, oldest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .manifest import Sealed


@dataclass(frozen=True)
class Removal:
    """One step that frees bytes."""

    checkpoint: Sealed
    action: Literal["lighten", "delete"]


@dataclass(kw_only=True)
class Retention:
    """The retention rules of one run."""

    limit: int | None = None
    """The largest number of whole checkpoints to keep (`save_total_limit`), the best counted; None: as many as the
    budget holds."""
    milestone_every: int | None = None
    """Optimizer steps between checkpoints that are kept, light, for evaluation."""
    best_step: int | None = None
    """Step of the best checkpoint by the metric."""

    def is_milestone(self, step: int) -> bool:
        return bool(self.milestone_every) and step % self.milestone_every == 0  # type: ignore[operator]

    def beyond_limit(self, sealed: Sequence[Sealed]) -> list[Removal]:
        """List what goes after a save so that `limit` holds; with limit 1 and a best, two stay.

        Args:
            sealed: sealed checkpoints, oldest step first.
        """
        if self.limit is None:
            return []
        best = [c for c in sealed if c.step == self.best_step]
        newest = newest_full(sealed)
        full = [c for c in sealed if not c.light and c not in best]
        kept = [*best, *full[max(len(full) - max(self.limit - len(best), 0), 0) :], newest]
        removals: list[Removal] = []
        for checkpoint in sealed:
            if checkpoint not in kept and not self.is_milestone(checkpoint.step):
                removals.append(Removal(checkpoint, "delete"))
            elif checkpoint not in kept and checkpoint.lightable:
                removals.append(Removal(checkpoint, "lighten"))
        return removals

    def for_space(self, sealed: Sequence[Sealed], *, emergency: bool) -> list[Removal]:
        """List what may go to make space for one more checkpoint, in order, each step only if needed.

        Lighten milestones and then the best; delete others; delete milestones; for an emergency save, the best.

        Args:
            sealed: sealed checkpoints, oldest step first.
        """
        newest = newest_full(sealed)
        rest = [c for c in sealed if c is not newest]
        best = [c for c in rest if c.step == self.best_step]
        milestones = [c for c in rest if self.is_milestone(c.step) and c not in best]
        others = [c for c in rest if c not in best and c not in milestones]
        order = [Removal(c, "lighten") for c in (*milestones, *best) if c.lightable]
        return order + [Removal(c, "delete") for c in (*others, *milestones, *(best if emergency else ()))]


def newest_full(sealed: Sequence[Sealed]) -> Sealed | None:
    """The newest checkpoint that can be resumed from."""
    return next((c for c in reversed(sealed) if not c.light), None)
