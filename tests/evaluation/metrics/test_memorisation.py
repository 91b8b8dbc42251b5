"""Exact memorisation and extraction strength, with OpenUnlearning's edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libortho.evaluation.metrics import exact_memorization, extraction_strength


@pytest.mark.parametrize(
    ("greedy", "exact", "strength"),
    [
        ([True, True, True, True, False], 1.0, 1.0),  # a wrong end of sequence does not count
        ([False, True, True, True, True], 0.75, 0.75),
        ([True, True, False, True, True], 0.75, 0.25),
        ([True, True, True, False, True], 0.75, 0.25),  # the whole answer is never the prefix
        ([False, False, False, False, True], 0.0, 0.25),
        ([False, True], 0.0, 1.0),
        ([True], None, 0.0),
    ],
)
def test_by_hand(greedy: list[bool], exact: float | None, strength: float) -> None:
    assert exact_memorization(greedy) == exact
    assert extraction_strength(greedy) == strength


@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_extraction_strength_by_search(greedy: list[bool]) -> None:
    answer = greedy[:-1]
    for prefix in range(len(answer)):
        if all(answer[prefix:]):
            break
    assert extraction_strength(greedy) == pytest.approx(1 - prefix / len(answer))
