"""Differences between checkpoints on the same rows: their size, their error, and what counts as noise."""

import math
import random
from dataclasses import replace

import pytest

from outlast.launcher.commands.evaluate import Row, overfits_from
from outlast.results.paired import FLIPS, difference


def test_few_rows_by_hand() -> None:
    found = difference([3.0, 2.0, 4.0], [1.0, 1.0, 1.0])  # differences 2, 1, 3
    assert found.mean == 2.0
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.p == pytest.approx(2 / 8, abs=0.02), "of eight combinations of signs, two give a sum of 6 or -6"
    assert found.is_noise


def test_what_is_noise() -> None:
    draw = random.Random(1)
    reference = [draw.gauss(3, 1) for _ in range(50)]
    noise = [loss + draw.gauss(0, 0.5) for loss in reference]
    worse = [loss + 0.1 + draw.gauss(0, 0.02) for loss in reference]  # small beside the rows' own differences
    assert difference(noise, reference).is_noise
    assert difference(worse, reference).p == 1 / (FLIPS + 1)
    same = difference(reference, reference)
    assert (same.mean, same.error, same.p, same.is_noise) == (0.0, 0.0, 1.0, True)
    assert difference([1.0], [2.0]).is_noise, "one row tells nothing"


def test_many_rows_are_normally_distributed() -> None:
    """For 1,000 differences with mean 1.96 errors, p is 0.05; also where signs are flipped."""
    for count in (1000, 200):
        values = [1.0, -1.0] * (count // 2)
        error = math.sqrt(count / (count - 1)) / math.sqrt(count)
        shifted = difference([value + 1.96 * error for value in values], [0.0] * count)
        assert shifted.mean / shifted.error == pytest.approx(1.96)
        assert shifted.p == pytest.approx(0.05, abs=0.012)


def test_where_it_begins_to_overfit() -> None:
    row = Row(
        checkpoint="", step=1, final=False, loss=1, best=False, difference=0.1, error=0.1, p=1, more_than_noise=False
    )
    best, worse = replace(row, step=2, best=True), replace(row, more_than_noise=True)
    assert overfits_from([replace(worse, step=1), best, row, replace(worse, step=4), replace(worse, step=5)]) == 4
    assert overfits_from([replace(worse, step=1), best, replace(worse, step=3), replace(row, step=4)]) is None
    assert overfits_from([replace(worse, step=1), best]) is None
