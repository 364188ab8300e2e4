"""Says at once, and once an attempt, that training is lost; and stops it, if that is what is wanted."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Protocol

from outlast.config.guard import GuardSection

from .divergence import Divergence

WINDOW = 50
"""Steps whose losses a loss is compared with."""
FEWEST = 10
"""Steps that there must have been."""
HARMLESS = "The weights are finite numbers, so training goes on. "
UNSURE = "The weights are not known: the run is lost if the next loss is no finite number either. "
LOST = "What is trained and saved from here on is likely to be of no use. "


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
        self._run, self._said, self._unsure = run, set[str](), False
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that the next one is compared with."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""
        self._losses = deque(state["losses"], WINDOW)

    def look(self, step: int, values: Mapping[str, Any], meaning: str = "") -> bool:
        """Warn if one of `values`, by name, is no finite number at optimizer step `step`; return whether one is not.

        Args:
            meaning: what is known of it, in a sentence; each is said once.
        """
        found = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if found and (not self._said or (meaning and meaning not in self._said)):
            self._said.add(meaning)
            shown = ", ".join(f"{name} is {values[name]}" for name in found)
            self._run.record("not_finite", step=step, values=found)
            self._run.say(
                f"WARNING: at step {step} {shown}. {meaning}Usual causes are the learning rate, the numbers' type "
                "(fp16) and rows without a label"
            )
        return bool(found)

    def look_at_loss(self, step: int, loss: float, weights: Callable[[], bool | None]) -> None:
        """Look at the loss of a step; if training is lost, all ranks stop by the next step's end.

        A loss that is no number does not say so by itself: a batch without a label makes one and changes no weight, and
        fp16's loss scaling skips the step. So the weights decide.

        Args:
            weights: whether this rank's are finite numbers, None if they are not known; asked if the loss is not.
        """
        guarding, lost = self._run.guarding, None
        if not math.isfinite(loss):
            finite = weights()
            if finite is False or (finite is None and self._unsure):
                lost = f"the loss is {loss}, and " + ("was none before" if finite is None else "so are weights")
            meaning = UNSURE if finite is None else HARMLESS
            self.look(step, {"the loss": loss}, meaning if lost is None else LOST)
            self._unsure = True
        else:
            self._unsure = False
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
