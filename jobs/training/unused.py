"""Judges what a row of data holds beside the keys of its form, none of which is trained on.

What would change the meaning of the row if it were left out is refused: a tool call in the place of an answer, a
message that is marked not to be learned, a picture. Anything else, such as an identifier, is left out, counted and
said. An empty value (null, false, an empty text or list) and a weight of 1 mean what leaving them out means.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_WEIGHTS = ("weight", "weights", "loss_weight", "sample_weight", "train", "trainable", "train_on_turn", "learn")
_MASKS = ("loss", "loss_mask", "mask", "masked", "ignore", "labels")
_CALLS = ("tools", "functions", "tool_calls", "function_call", "tool_plan")
_THOUGHTS = ("reasoning", "reasoning_content", "thinking", "thought", "thoughts")
_CONTEXT = (
    "system",
    "system_prompt",
    "instruction",
    "input",
    "context",
    "history",
    "documents",
    "chat_template_kwargs",
)
_PREFIX = ("prefix", "prefill", "continue_final_message")

REFUSED: dict[str, str] = {
    **dict.fromkeys(_MEDIA, "only text is trained on"),
    **dict.fromkeys(_WEIGHTS, "all are trained on alike; leave out what is not to be learned"),
    **dict.fromkeys(_MASKS, "all are trained on alike; leave out what is not to be learned"),
    **dict.fromkeys(_CALLS, "the model would see neither tools nor calls; write them into the text"),
    **dict.fromkeys(_THOUGHTS, "it would be left out; write it into the text"),
    **dict.fromkeys(_CONTEXT, "it would be left out; write it into the text"),
    **dict.fromkeys(_PREFIX, "it would be left out"),
}
"""Keys that change the meaning of a row or a message, each with what to know."""

_NEUTRAL = (*_WEIGHTS, "loss")
"""Keys that say nothing when they are 1 or true."""


class Unused:
    """Counts keys that are left out, over the rows of one file or split."""

    def __init__(self) -> None:
        self.rows = 0
        self._counts: Counter[str] = Counter()

    def judge(self, row: Mapping[str, Any], form: tuple[str, ...]) -> str:
        """Count what is left out of a row.

        Args:
            form: the keys that are trained on.

        Returns:
            What is wrong with the row: it holds a key of :data:`REFUSED`. Nothing is: an empty string.
        """
        self.rows += 1
        seen = set()
        parts: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [("it", row, form)]
        for name in form:
            for number, message in enumerate(row[name] if is_chat(row[name]) else [], start=1):
                parts.append((f"message {number}", message, ("role", "content")))
        for place, part, used in parts:
            for key, value in part.items():
                if key in used or _says_nothing(key, value):
                    continue
                if key in REFUSED and not (key in _CONTEXT and form == ("text",)):  # a text is whole by itself
                    return f"{place} has {key!r}, which is not used: {REFUSED[key]}"
                seen.add(repr(key) if part is row else f"{key!r} of messages")
        self._counts.update(seen)
        return ""

    def notes(self, key: str) -> list[str]:
        """What was left out, in words; `key` names the data in the configuration."""
        if not self._counts:
            return []
        left_out = ", ".join(f"{name} in {count}" for name, count in sorted(self._counts.items()))
        return [f"{key}: not used, of {self.rows} rows: {left_out}"]


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _says_nothing(key: str, value: Any) -> bool:
    if isinstance(value, int | float) and key in _NEUTRAL:
        return value == 1
    if isinstance(value, int | float) and key in REFUSED and not isinstance(value, bool):
        return False  # a weight or a mask of 0
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)
