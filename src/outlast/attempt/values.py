"""Turns state into values that a checkpoint may hold, and back: plain values, arrays, random generators.

A checkpoint is read with `weights_only`, so that it can't execute code. What that doesn't read is written as plain
tuples here, `(kind, ...)`.
"""

import random
from collections import deque
from typing import Any

PLAIN = (type(None), bool, int, float, complex, str, bytes)
ITEMS = 100_000
"""Items of a container beyond which it counts as data, not as state."""


class NotPlainError(TypeError):
    """A value is neither plain nor an array nor a generator."""


def is_generator(value: Any) -> bool:
    """Whether `value` draws random numbers from a state of its own that can be read and set."""
    import numpy as np
    import torch

    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)
    return isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | np.random.BitGenerator)


def encode(value: Any) -> Any:
    """Return `value` as something that `torch.load(weights_only=True)` reads; nothing of it is shared with `value`.

    Raises:
        NotPlainError: it, or something in it, can't be written that way.
    """
    import numpy as np
    import torch

    if type(value) in PLAIN:
        return value
    if type(value) in (list, tuple, set, frozenset, deque):
        if len(value) > ITEMS:
            raise NotPlainError(f"{len(value)} items")
        limit = (value.maxlen,) if isinstance(value, deque) else ()
        return (type(value).__name__, [encode(item) for item in value], *limit)
    if isinstance(value, dict):
        if len(value) > ITEMS:
            raise NotPlainError(f"{len(value)} items")
        return ("dict", [(encode(key), encode(item)) for key, item in value.items()])
    if isinstance(value, torch.Tensor):
        return ("tensor", value.detach().clone().cpu())
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "biufc":
            raise NotPlainError(f"an array of {value.dtype}")
        return ("array", torch.from_numpy(np.array(value)), isinstance(value, np.generic))
    if is_generator(value):
        return ("generator", _kind(value), encode(_state(value)))
    raise NotPlainError(type(value).__name__)


def decode(encoded: Any, into: Any = None) -> Any:
    """Return the value that :func:`encode` was given.

    Args:
        into: what is there now. A container or generator of the same kind, and a tensor of the same shape, is filled
            and returned itself, so that whoever else holds it sees the change; so are those in a container. A
            parameter, which a checkpoint holds already, is kept if it is equal, and never filled.
    """
    import torch

    if not isinstance(encoded, tuple):
        return encoded
    kind, content = encoded[0], encoded[1]
    if kind == "tensor":
        if isinstance(into, torch.nn.Parameter):
            return into if same(into.detach().cpu(), content.cpu()) else content.clone()
        if isinstance(into, torch.Tensor) and into.shape == content.shape and into.dtype == content.dtype:
            with torch.no_grad():
                into.copy_(content)
            return into
        return content.clone()
    if kind == "array":
        return content.numpy().copy()[()] if encoded[2] else content.numpy().copy()
    if kind == "generator":
        generator = into if is_generator(into) and _kind(into) == content else _new(content)
        _set_state(generator, decode(encoded[2]))
        return generator
    if kind == "dict":
        present = into if isinstance(into, dict) else {}
        keys = [decode(key) for key, _ in content]
        items: Any = {key: decode(item, present.get(key)) for key, (_, item) in zip(keys, content, strict=True)}
    else:
        there = list(into) if isinstance(into, list | tuple | deque) else []
        items = [decode(item, there[i] if i < len(there) else None) for i, item in enumerate(content)]
    if isinstance(into, list) and kind == "list":
        into[:] = items
        return into
    if isinstance(into, dict | set | deque) and kind in ("dict", "set", "deque"):
        into.clear()
        into.extend(items) if isinstance(into, deque) else into.update(items)
        return into
    if kind == "deque":
        return deque(items, encoded[2])
    makers: dict[str, Any] = {"dict": dict, "list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return makers[kind](items)


def is_still(value: Any, encoded: Any) -> bool:
    """Whether `value` would be encoded as this; False also where it takes encoding it to know.

    It makes no copy, so it is many times faster where much is looked at and little changes.
    """
    import torch

    kind = type(value)
    if kind in PLAIN:
        return kind is type(encoded) and bool(value == encoded)
    if type(encoded) is not tuple or len(encoded) < 2:
        return False
    if kind in (list, tuple, dict):
        if encoded[0] != kind.__name__ or len(encoded[1]) != len(value):
            return False
        if kind is not dict:
            return all(map(is_still, value, encoded[1]))
        pairs = zip(value.items(), encoded[1], strict=True)
        return all(is_still(key, a) and is_still(item, b) for (key, item), (a, b) in pairs)
    if kind is torch.Tensor and encoded[0] == "tensor" and value.device.type == "cpu":
        return same(value.detach(), encoded[1])
    return False


def same(one: Any, other: Any) -> bool:
    """Whether two encoded values are equal."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other) or (one != one and other != other)


def bits(tensor: Any) -> Any:
    """Return a view of a tensor as whole numbers of the same size."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    return tensor.view(whole) if whole else torch.view_as_real(tensor).view(torch.int64)


def _kind(generator: Any) -> str:
    import torch

    if isinstance(generator, random.Random):
        return "python"
    if isinstance(generator, torch.Generator):
        return f"torch:{generator.device}"
    bits = getattr(generator, "bit_generator", None)
    return f"numpy:{type(generator).__name__}" + (f":{type(bits).__name__}" if bits is not None else "")


def _new(kind: str) -> Any:
    import numpy as np
    import torch

    library, _, name = kind.partition(":")
    if library == "python":
        return random.Random()
    if library == "torch":
        return torch.Generator(name)
    outer, _, bits = name.partition(":")
    return getattr(np.random, outer)(getattr(np.random, bits)()) if bits else getattr(np.random, outer)()


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):
        return generator.get_state()
    return getattr(generator, "bit_generator", generator).state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state
