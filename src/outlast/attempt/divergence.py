"""Has all ranks stop together, with nothing saved, when the loss of one says that training is lost."""

from collections.abc import Callable
from pathlib import Path

from outlast.checkpoint.manifest import Sealed
from outlast.errors import CheckpointError, DivergedError
from outlast.ranks.collectives import Collectives

ASK = "diverged"
"""What the ranks agree on, as on a stop."""


class Divergence:
    """What one rank knows of it."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self.why: str | None = None
        """Why training is lost, in words; None while it is not."""

    def ask(self, asked: str) -> str:
        """Return what to ask the other ranks for: this, or what else there is."""
        return ASK if self.why else asked

    def heed(self, agreed: str) -> str:
        """Return what the ranks have agreed on, if it is not this; all ranks are at the same poll.

        Raises:
            DivergedError: it is.
        """
        if agreed == ASK:
            self._refuse_on_all()
        return agreed

    def guarded(self, save_on_all: Callable[..., Sealed | None]) -> Callable[..., Sealed | None]:
        """Return `save_on_all`, which gets a step and a function that writes, with what is lost refused.

        What one rank can't write is published on none. All ranks then raise the same error, whichever rank has seen it.
        """

        def save(step: int, write: Callable[[Path], None], **how: object) -> Sealed | None:
            def write_unless_lost(directory: Path) -> None:
                write(directory)
                self._refuse(self.why)

            try:
                sealed = save_on_all(step, write_unless_lost, **how)
            except CheckpointError:
                self._refuse_on_all()
                raise
            if sealed is None:
                self._refuse_on_all()
            return sealed

        return save

    def _refuse_on_all(self) -> None:
        reasons = self._collectives.from_all(self.why)
        for rank, why in enumerate(reasons):
            self._refuse(f"{why}, on rank {rank}" if why and len(reasons) > 1 else why)

    def _refuse(self, why: str | None) -> None:
        """Refuse to go on with what is lost, or to save it.

        Raises:
            DivergedError: `why` is given.
        """
        if why:
            raise DivergedError(
                f"{why}: training is lost, and stops before that is saved; the newest checkpoint is from before. "
                "The same would come again, so the run is not started again by itself. Usual causes are the learning "
                "rate, the numbers' type (fp16) and rows without a label; guard.action=report trains on"
            )
