"""Answer probability, and its share among the options."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libortho.evaluation.metrics import normalised_probability, probability


def test_probability_is_per_token() -> None:
    assert probability(0.0) == 1.0
    # Three tokens of probability 0.5, 0.25, 0.125: the cube root of their product.
    loss = -(math.log(0.5) + math.log(0.25) + math.log(0.125)) / 3
    assert probability(loss) == pytest.approx((0.5 * 0.25 * 0.125) ** (1 / 3))


def test_normalised_probability() -> None:
    assert normalised_probability(0.3, [0.1, 0.2]) == pytest.approx(0.5)
    assert normalised_probability(0.0, [0.0]) == 0.0  # not a division by zero
    with pytest.raises(ValueError, match="at least 1"):
        normalised_probability(0.3, [])


@given(st.floats(1e-6, 1), st.lists(st.floats(0, 1), min_size=1))
def test_normalised_probability_is_one(right: float, wrong: list[float]) -> None:
    value = normalised_probability(right, wrong)
    assert 0 < value <= 1
    assert value >= normalised_probability(right, [*wrong, 0.1])
