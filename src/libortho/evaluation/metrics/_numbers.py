"""What the metrics share: the guard of a denominator, and a mean that says what it lacks."""

from __future__ import annotations

from collections.abc import Sequence

EPSILON = 1e-10
"""OpenUnlearning's guard against a zero denominator."""


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no value was given: a mean needs at least one")
    return sum(values) / len(values)
