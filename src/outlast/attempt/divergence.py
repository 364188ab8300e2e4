"""Has all ranks stop together, with nothing saved, when the loss of one says that training is lost."""

from collections.abc import Callable
from pathlib import Path

from outlast.errors import DivergedError

ASK = "diverged"
"""What the ranks agree on, as on a stop."""


class Divergence:
    """What one rank knows of it."""

    why: str | None = None
    """Why training is lost, in words; None while it is not."""

    def ask(self, asked: str) -> str:
        """Return what to ask the other ranks for: this, or what else there is."""
        return ASK if self.why else asked

    def heed(self, agreed: str, step: int) -> str:
        """Return what the ranks have agreed on, if it is not this.

        Raises:
            DivergedError: it is.
        """
        if agreed == ASK:
            self.why = self.why or f"by step {step} another rank's loss says so"
            self.refuse()
        return agreed

    def refuse(self) -> None:
        """Refuse to go on with what is lost, or to save it.

        Raises:
            DivergedError: it is.
        """
        if self.why:
            raise DivergedError(
                f"{self.why}: training is lost, and stops before that is saved; the newest checkpoint is from before. "
                "The same would come again, so the run is not started again by itself. Usual causes are the learning "
                "rate, the numbers' type (fp16) and rows without a label; guard.action=report trains on"
            )

    def refusing(self, save: Callable[[Path], None]) -> Callable[[Path], None]:
        """Return `save`, failing if training is lost: what one rank can't write is published on none."""

        def write(directory: Path) -> None:
            save(directory)
            self.refuse()

        return write
