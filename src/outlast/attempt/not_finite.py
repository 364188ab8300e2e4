"""Says at once, and once an attempt, that training has left the numbers: a loss that is NaN or infinite."""

import math
from collections.abc import Mapping
from typing import Any, Protocol


class _Run(Protocol):
    def record(self, event: str, **values: Any) -> None: ...

    def say(self, text: str) -> None: ...


class NotFinite:
    """Warns once an attempt that a loss is NaN or infinite."""

    def __init__(self, run: _Run) -> None:
        self._run, self._said = run, False

    def look(self, step: int, values: Mapping[str, Any]) -> None:
        """Warn if one of `values`, by name, is no finite number at optimizer step `step`."""
        found = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if found and not self._said:
            self._said = True
            shown = ", ".join(f"{name} is {values[name]}" for name in found)
            self._run.record("not_finite", step=step, values=found)
            self._run.say(
                f"WARNING: at step {step} {shown}. What is trained and saved from here on is likely to be of no use; "
                "usual causes are the learning rate, the numbers' type (fp16) and rows without a label"
            )
