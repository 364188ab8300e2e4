"""Weights decide whether a loss that is no number says that training is lost."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outlast.attempt.not_finite import NotFinite
from outlast.config.guard import GuardSection
from outlast.huggingface.finite_weights import Stepped, are_finite


def test_weights_are_those_that_this_rank_trains() -> None:
    """Frozen ones don't count; with ZeRO-3 the parameter is empty and its shard holds the numbers."""
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.tensor([1.0, math.inf]))
    assert are_finite([good]) is True
    assert are_finite([good, bad]) is False
    assert are_finite([good, bad.requires_grad_(False)]) is True
    empty: Any = torch.nn.Parameter(torch.empty(0))
    assert are_finite([empty]) is None
    empty.ds_tensor = torch.tensor([math.nan])
    assert are_finite([good, empty]) is False


def test_optimizers_are_noted_as_they_step() -> None:
    stepped, weight = Stepped(), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert stepped.are_finite() is None
    optimizer.step()
    assert stepped.are_finite() is True
    weight.grad = torch.full((2,), math.nan)
    optimizer.step()
    assert stepped.are_finite() is False
    stepped.close()


@pytest.mark.parametrize(
    ("losses", "weights", "lost_at"),
    [
        ((math.nan, math.nan), True, None),
        ((1.0, math.inf), False, 1),
        ((math.nan, 1.0, math.nan), None, None),
        ((1.0, math.nan, math.nan), None, 2),
    ],
)
def test_when_training_is_lost(losses: tuple[float, ...], weights: bool | None, lost_at: int | None) -> None:
    divergence = SimpleNamespace(why=None)
    run: Any = SimpleNamespace(
        guarding=GuardSection(),
        steps=SimpleNamespace(divergence=divergence),
        record=lambda *_, **__: None,
        say=lambda _: None,
    )
    guard = NotFinite(run)
    for step, loss in enumerate(losses):
        guard.look_at_loss(step, loss, lambda: weights)
    if lost_at is None:
        assert divergence.why is None
    else:
        assert divergence.why.startswith(f"at step {lost_at} the loss is {losses[lost_at]}, and ")
