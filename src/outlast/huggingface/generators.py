"""Random generators: the process's own, and those that the objects of a data pipeline hold."""

import functools
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

DEPTH = 4
"""How far from the dataset or the sampler a generator is looked for, in attributes, closures and containers."""
ITEMS = 100
"""Items of a container beyond which it counts as data, and is not looked into."""
LIBRARIES = frozenset(
    ("torch", "transformers", "accelerate", "datasets", "numpy", "pyarrow", "pandas", "PIL", "tokenizers")
)
"""Packages whose objects are not looked into, but for a `generator` of torch's own samplers."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.Tensor, np.ndarray)


def derived(*parts: int) -> int:
    """A seed of 32 bits that depends on each of `parts`, which are not negative."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_process(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generator of this process; a GPU's draws no data."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def reseed(generator: Any, seed: int) -> None:
    """Begin `generator` anew with a seed of 32 bits."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed)


def find(root: Any) -> list[Any]:
    """The generators that can be reached from `root`, in an order that follows from its structure."""
    return list(_walk(root, DEPTH, set()))


def _walk(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        if not isinstance(value, random.SystemRandom):
            yield value
        return
    for item in _held(value) if depth else ():
        yield from _walk(item, depth - 1, seen)


def _held(value: Any) -> list[Any]:
    """What `value` holds, as far as state of the user's may be in it."""
    if isinstance(value, dict):
        return list(value.values())[:ITEMS] if len(value) <= ITEMS else []
    if isinstance(value, list | tuple):
        return list(value) if len(value) <= ITEMS else []
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        if _is_library(value.__module__):
            return []
        named = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return [*cells, *(value.__defaults__ or ()), *named]
    if _is_library(type(value).__module__) and not isinstance(
        value, torch.utils.data.Sampler | torch.utils.data.Dataset
    ):
        return []
    call = getattr(type(value), "__call__", None)  # noqa: B004  (a collator that uses a global generator)
    methods = [getattr(type(value), name, None) for name in ("__getitem__", "__iter__")]
    return [*vars(value).values(), call, *methods] if hasattr(value, "__dict__") else []


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES
