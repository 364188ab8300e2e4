"""Which checkpoints may go, and in what order."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class HasStep(Protocol):
    @property
    def step(self) -> int: ...


T = TypeVar("T", bound=HasStep)


def deletion_order(sealed: Sequence[T], best_step: int | None, *, keep_best: bool = True) -> list[T]:
    """The checkpoints that may be deleted, first to go first.

    The newest is never in it, whatever kind it is: it is what a resume starts from, and an emergency checkpoint is the
    newest until a successor has been sealed. The best by metric is not either, unless `keep_best` is false (an
    emergency save needs the room), and then it is the last to go.

    Args:
        sealed: sealed checkpoints (anything with `.step`), oldest step first.
        best_step: step of the best, or None.
    """
    candidates = list(sealed[:-1])
    best = [c for c in candidates if c.step == best_step]
    others = [c for c in candidates if c.step != best_step]
    return others if keep_best else others + best
