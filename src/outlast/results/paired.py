"""Tells a difference between two checkpoints from noise: both are scored on the same rows, so the test is paired."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

FEW = 200
"""Rows up to which signs are flipped; for more, the mean is as good as normally distributed."""
FLIPS = 9_999
SIGNIFICANT = 0.05
"""The probability below which a difference counts as more than noise."""


@dataclass(frozen=True)
class Difference:
    """How far the mean loss of one checkpoint is above that of another."""

    mean: float
    error: float
    """Its standard error; NaN for a single row."""
    p: float
    """The probability of a difference as large, either way, if the two were equally good on rows like these."""

    @property
    def is_noise(self) -> bool:
        return not self.p < SIGNIFICANT


def difference(losses: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare two checkpoints on the same rows, by the differences d_i = losses_i - reference_i of n rows.

    The standard error of their mean is s / sqrt(n), with s² = Σ (d_i - mean)² / (n - 1) (Student, "The probable error
    of a mean", Biometrika 6, 1908). Up to 200 rows, p is that of Fisher's randomization test ("The Design of
    Experiments", 1935, §21): if both are equally good, each d_i is as likely to have the other sign, so p is the share
    of random signs that give a mean as large in size; of B random draws b, it is (b + 1) / (B + 1) (Phipson and Smyth,
    "Permutation p-values should never be zero", 2010). For more rows p = 2 Φ(-|mean| / error), the normal limit of
    Student's test. Rows count as drawn independently. Nothing corrects for several checkpoints, nor for that the best
    was chosen on the same rows: with many, some of twenty equal ones look different.

    Raises:
        ValueError: the numbers of rows differ.
    """
    each = [one - other for one, other in zip(losses, reference, strict=True)]
    mean, count = fmean(each), len(each)
    if not any(each):
        return Difference(0.0, 0.0, 1.0)
    error = stdev(each) / math.sqrt(count) if count > 1 else math.nan
    if count > FEW:
        return Difference(mean, error, 2 * NormalDist().cdf(-abs(mean) / error) if error else 0.0)
    import numpy as np

    values = np.asarray(each)
    signs = np.random.default_rng(0).integers(0, 2, (FLIPS, count)) * 2 - 1
    as_large = int((np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)).sum())
    return Difference(mean, error, (as_large + 1) / (FLIPS + 1))
