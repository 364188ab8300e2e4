"""Random generators are found wherever a data pipeline may hold them, in an order that is the same in each process."""

import functools
import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Subset

from outlast.huggingface.generators import find, reseed, too_large

alpha, beta, gamma, delta, epsilon, zeta = (random.Random(number) for number in range(6))
system = random.SystemRandom()


def collate(rows: Any, chosen: random.Random = zeta) -> list[float]:
    return [each.random() for each in (epsilon, beta, delta, alpha, gamma, system)]


class Rows(Dataset[Any]):
    def __init__(self) -> None:
        self.parts = [{"noise": np.random.default_rng(1)}]

    def __getitem__(self, row: int) -> Any:
        return (lambda: torch.rand(1, generator=of_torch))()


of_torch = torch.Generator()


def test_in_the_order_in_which_a_function_names_them() -> None:
    assert find(collate) == [epsilon, beta, delta, alpha, gamma, zeta]


def test_in_attributes_methods_samplers_and_partial_calls() -> None:
    rows, own, bits = Rows(), torch.Generator(), np.random.PCG64(3)
    assert find(Subset(rows, [0])) == [of_torch, rows.parts[0]["noise"]]
    assert find([BatchSampler(RandomSampler([1, 2], generator=own), 2, False)], None) == [own]
    assert find(functools.partial(collate, bits=bits))[-1] is bits


def test_begun_anew_each_kind_repeats_itself() -> None:
    kinds = (
        random.Random(1),
        np.random.default_rng(1),
        np.random.RandomState(1),
        np.random.PCG64(1),
        torch.Generator(),
    )

    def drawn(generator: Any) -> Any:
        reseed(generator, 7)
        if isinstance(generator, torch.Generator):
            return torch.rand(1, generator=generator).item()
        return generator.random_raw() if isinstance(generator, np.random.PCG64) else generator.random()

    assert [drawn(each) for each in kinds] == [drawn(each) for each in kinds]


def test_what_is_too_large_to_be_looked_through_is_named() -> None:
    """What comes after it is looked through all the same."""
    rows = [[object() for _ in range(900)] for _ in range(9)]
    assert too_large(rows, collate) == [rows]
    assert find(rows, alpha) == [alpha]
    assert too_large(collate) == []
