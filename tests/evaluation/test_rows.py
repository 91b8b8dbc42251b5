"""Rows of several seeds as one."""

from __future__ import annotations

import math

from libortho.evaluation.rows import median_row


def test_numbers_are_medians() -> None:
    rows = [{"seconds": 9.0, "model_utility": u} for u in (0.1, 0.5, 0.4)]
    assert median_row(rows) == {"seconds": 9.0, "model_utility": 0.4}
    assert math.isnan(median_row([{"x": 1.0}, {"x": math.nan}])["x"])


def test_what_a_seed_lacks_is_left_out() -> None:
    """The first seed's number would pass for the median."""
    seeds = [{"forget_fluency": 3.0, "x": 1.0}, {"x": 2.0}, {"forget_fluency": 90.0, "x": 3.0}]
    assert median_row(seeds) == {"x": 2.0}


def test_a_baseline_reached_the_level_if_it_did_at_every_seed() -> None:
    seeds = [{"stopped": True}, {"stopped": False}, {"stopped": False}]
    assert median_row(seeds) == {"stopped": False}
    assert median_row([seeds[0], seeds[0]]) == {"stopped": True}


def test_lists_are_the_first_seeds() -> None:
    seeds = [{"truth_ratios": [0.3, 0.2]}, {"truth_ratios": [0.9, 0.1]}]
    assert median_row(seeds) == {"truth_ratios": [0.3, 0.2]}
