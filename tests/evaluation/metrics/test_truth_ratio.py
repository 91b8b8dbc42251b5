"""Truth ratio, its two aggregates and forget quality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gmean

from libortho.evaluation.metrics import (
    closer_to_one_better,
    forget_quality,
    true_better,
    truth_ratio,
)

LOSSES = st.floats(0, 15)


@given(LOSSES, st.lists(LOSSES, min_size=1, max_size=6))
def test_truth_ratio_is_the_geometric_mean(right: float, wrong: list[float]) -> None:
    expected = gmean(np.exp(-np.array(wrong))) / (math.exp(-right) + 1e-10)
    assert truth_ratio(right, wrong) == pytest.approx(float(expected), rel=1e-9)


def test_truth_ratio_is_not_the_papers() -> None:
    wrong = [0.1, 3.0]
    paper = (math.exp(-0.1) + math.exp(-3.0)) / 2 / math.exp(-1.0)
    assert truth_ratio(1.0, wrong) < 0.6 * paper


def test_truth_ratio_of_extremes() -> None:
    assert truth_ratio(1000.0, [0.0]) == pytest.approx(1e10)  # guarded, not a division by zero
    assert truth_ratio(0.0, [1000.0]) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        truth_ratio(1.0, [])


def test_aggregates() -> None:
    ratios = [0.25, 1.0, 4.0]
    assert closer_to_one_better(ratios) == pytest.approx((0.25 + 1 + 0.25) / 3)
    assert true_better(ratios) == pytest.approx(0.75 / 3)
    for aggregate in (closer_to_one_better, true_better):
        with pytest.raises(ValueError, match="at least one"):
            aggregate([])
    assert closer_to_one_better([0.0]) == 0.0


def test_forget_quality_tells_equal_from_different() -> None:
    one = [i / 40 for i in range(40)]
    assert forget_quality(one, one) == pytest.approx(1.0)
    assert forget_quality(one, [x + 2 for x in one]) < 1e-6
    # By hand: of 2 + 2 values that do not overlap, 2 of the 6 orders are as extreme.
    assert forget_quality([1, 2], [3, 4]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="1 truth ratios against 0"):
        forget_quality([1.0], [])
