"""Random generators: the process's own, and those that the objects of a data pipeline hold."""

import random
from typing import Any

import numpy as np
import torch

from outlast.attempt.values import is_generator

from .reachable import holders


def derived(*parts: int) -> int:
    """A seed of 32 bits that depends on each of `parts`, but not on their signs."""
    return int(np.random.SeedSequence([abs(part) for part in parts]).generate_state(1)[0])


def seed_process(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generator of this process; a GPU's draws no data."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def seed_for_what_follows(seed: int, step: int, rank: int) -> None:
    """Seed this process, GPUs included, for what a script does after training: alike whenever it comes to it."""
    own = derived(seed, step, rank)
    seed_process(own)
    torch.manual_seed(own)


def reseed(generator: Any, seed: int) -> None:
    """Begin `generator` anew with a seed of 32 bits."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator | np.random.BitGenerator):
        bits: Any = getattr(generator, "bit_generator", generator)
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed)


def find(*roots: Any) -> list[Any]:
    """The generators that can be reached from `roots`, in an order that follows from their structure."""
    return _look(roots)[0]


def too_large(*roots: Any) -> list[Any]:
    """Those of `roots` from which more objects can be reached than are looked through."""
    return _look(roots)[1]


def _look(roots: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    found, seen, left = dict[int, Any](), dict[int, Any](), list[Any]()
    for root in roots:
        try:
            for holder in holders("", [root], seen):
                found |= {id(value): value for value in holder.read().values() if is_generator(value)}
        except OverflowError:
            left.append(root)
    return list(found.values()), left
