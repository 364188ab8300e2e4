"""Says at once, and once an attempt, that training is lost; and stops it, if that is what is wanted."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Protocol

from outlast.config.guard import GuardSection

from .divergence import Divergence

WINDOW = 50
"""Steps whose losses a loss is compared with."""
FEWEST = 10
"""Steps that there must have been."""


class _Run(Protocol):
    @property
    def guarding(self) -> GuardSection: ...

    @property
    def steps(self) -> "_Steps": ...

    def record(self, event: str, **values: Any) -> None: ...

    def say(self, text: str) -> None: ...


class _Steps(Protocol):
    divergence: Divergence


class NotFinite:
    """Looks at the losses of one rank."""

    def __init__(self, run: _Run) -> None:
        self._run, self._said = run, False
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that the next one is compared with."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""
        self._losses = deque(state["losses"], WINDOW)

    def look(self, step: int, values: Mapping[str, Any]) -> bool:
        """Warn if one of `values`, by name, is no finite number at optimizer step `step`; return whether one is not."""
        found = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if found and not self._said:
            self._said = True
            shown = ", ".join(f"{name} is {values[name]}" for name in found)
            self._run.record("not_finite", step=step, values=found)
            self._run.say(
                f"WARNING: at step {step} {shown}. What is trained and saved from here on is likely to be of no use; "
                "usual causes are the learning rate, the numbers' type (fp16) and rows without a label"
            )
        return bool(found)

    def look_at_loss(self, step: int, loss: float, *, skipped: bool = False) -> None:
        """Look at the loss of a step; if training is lost, all ranks stop by the next step's end.

        Args:
            skipped: the step was left out on account of it, as with fp16: the weights are as they were.
        """
        guarding = self._run.guarding
        lost = f"the loss is {loss}" if self.look(step, {"the loss": loss}) and not skipped else None
        if lost is None and math.isfinite(loss):
            usual = median(self._losses) if len(self._losses) >= FEWEST else math.inf
            if guarding.spike is not None and loss > guarding.spike * usual > 0:
                count = len(self._losses)
                lost = f"the loss is {loss:.4g}, {loss / usual:.3g} times the median of the {count} steps before"
                self._run.record("spike", step=step, loss=loss, median=usual)
                self._run.say(f"WARNING: at step {step} {lost}; guard.spike is {guarding.spike:g}")
            self._losses.append(loss)
        divergence = self._run.steps.divergence
        if lost is not None and guarding.action == "stop" and divergence.why is None:
            divergence.why = f"at step {step} {lost}"
