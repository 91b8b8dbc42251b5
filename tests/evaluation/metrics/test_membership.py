"""Membership scores by hand, and their AUC against a count of pairs."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libortho.evaluation.metrics import (
    loss_score,
    membership_auc,
    min_k_plus_plus_score,
    min_k_score,
    privleak,
    roc_curve,
    tpr_at_fpr,
    zlib_score,
)

NLL = [0.5, 4.0, 1.0, 3.0, 2.0, 9.0]  # the last is the end of sequence


def test_loss_counts_every_token() -> None:
    assert loss_score(NLL) == pytest.approx(19.5 / 6)


def test_zlib_divides_by_the_compressed_bytes() -> None:
    text = "Łódź, " * 20
    assert zlib_score(NLL, text) == pytest.approx(
        19.5 / 6 / len(zlib.compress(text.encode("utf-8")))
    )
    assert zlib_score(NLL, text) > zlib_score(NLL, text + "and quite another one")


@pytest.mark.parametrize(
    ("k", "expected"), [(0.4, (4 + 3) / 2), (0.2, 4.0), (0.01, 4.0), (0.79, 3.0), (1.0, 2.1)]
)
def test_min_k(k: float, expected: float) -> None:
    assert min_k_score(NLL, k) == pytest.approx(expected)


def test_min_k_plus_plus() -> None:
    means = [-1.0, -2.0, -1.0, -3.0, -0.5, 0.0]
    variances = [4.0, 1.0, 0.0, 0.25, 1.0, 1.0]
    # (nll + mean) / deviation: -0.25, 2, 0, 0, 1.5; the end of sequence's 9 does not count.
    assert min_k_plus_plus_score(NLL, means, variances) == pytest.approx((2 + 1.5) / 2)
    # A variance of 0 counts as 1e-6.
    assert min_k_plus_plus_score([1.5, 0], [-1, 0], [0, 0]) == pytest.approx(0.5 / 1e-3)
    with pytest.raises(ValueError, match="shorter"):
        min_k_plus_plus_score(NLL, means[:-1], variances)


def test_nothing_but_the_end_of_sequence() -> None:
    assert min_k_score([3.0]) == 0.0
    assert min_k_plus_plus_score([3.0], [-1.0], [1.0]) == 0.0
    assert loss_score([3.0]) == 3.0


@pytest.mark.parametrize("k", [0, -0.1, 1.5])
def test_k_out_of_range(k: float) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        min_k_score(NLL, k)


SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs(forget: list[float], holdout: list[float]) -> None:
    pairs = [(h > f) + 0.5 * (h == f) for h in holdout for f in forget]
    assert membership_auc(forget, holdout) == pytest.approx(sum(pairs) / len(pairs))


def test_auc_has_openunlearnings_sign() -> None:
    assert membership_auc([0.1, 0.2], [3.0, 4.0]) == 1.0  # memorised: a low loss
    with pytest.raises(ValueError, match="1 forget scores against 0"):
        membership_auc([1.0], [])
    with pytest.raises(ValueError, match="score is nan"):
        membership_auc([math.nan], [1.0])


def test_privleak() -> None:
    assert privleak(0.5, 0.5) == 0.0
    assert privleak(1.0, 0.5) == pytest.approx(-100)  # still recognised
    assert privleak(0.0, 0.5) == pytest.approx(100)  # conspicuously unlikely
    assert privleak(0.6, 0.2) == pytest.approx((0.4 - 0.8) / 0.8 * 100)
    assert math.isfinite(privleak(0.5, 1.0))


scores_of_some = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)


@given(scores_of_some, scores_of_some, st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0]))
def test_tpr_is_the_best_of_all_thresholds(forget, holdout, fpr: float) -> None:
    best = 0.0
    for threshold in [-1, *range(8)]:
        wrong = sum(s <= threshold for s in holdout)
        if wrong <= fpr * len(holdout):
            best = max(best, sum(s <= threshold for s in forget) / len(forget))
    assert tpr_at_fpr(forget, holdout, fpr) == pytest.approx(best)


@given(scores_of_some, scores_of_some)
def test_the_area_under_the_curve_is_the_auc(forget, holdout) -> None:
    curve = roc_curve(forget, holdout)
    assert curve[0] == (0.0, 0.0)
    assert curve[-1] == (1.0, 1.0)
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(curve))
    assert area == pytest.approx(membership_auc(forget, holdout))


def test_rates_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"fpr=-0\.1"):
        tpr_at_fpr([1.0], [2.0], -0.1)
    with pytest.raises(ValueError, match="expected at least 1 each"):
        tpr_at_fpr([], [2.0])
