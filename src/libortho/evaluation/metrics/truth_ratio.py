"""Truth ratio and forget quality (TOFU: Maini et al. 2024, arXiv 2401.06121, section 2.2.2-2.2.3).

A truth ratio is about 1 for a model that knows nothing of the matter and near 0 for one that knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from libortho.evaluation.metrics._numbers import EPSILON, mean


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """P(wrong answers) / P(right answer), at least 0.

    OpenUnlearning's definition, which is not the paper's: the paper takes the arithmetic mean of
    the wrong answers' probabilities, OpenUnlearning the geometric one (exp of minus the mean of
    their losses), and adds 1e-10 to the denominator. The wrong answers' geometric mean is at most
    their arithmetic one, so its ratios are the smaller.

    Args:
        right: mean NLL per token, nats, of the paraphrased right answer; of the right answer itself
            for real authors and world facts, which have no paraphrase.
        wrong: the same of each wrong answer.

    Raises:
        ValueError: no wrong answer.
    """
    if not wrong:
        raise ValueError("no wrong answer was given: a truth ratio needs at least 1")
    return math.exp(-mean(wrong)) / (math.exp(-right) + EPSILON)


def closer_to_one_better(ratios: Sequence[float]) -> float:
    """Aggregate for the forget set: mean of min(ratio, 1 / ratio), in [0, 1]; 1 is forgotten.

    OpenUnlearning's `closer_to_1_better`: a ratio above 1, which says that the wrong answers are
    preferred, is as telling as one below.

    Raises:
        ValueError: no ratio.
    """
    return mean([min(ratio, 1 / (ratio + EPSILON)) for ratio in ratios])


def true_better(ratios: Sequence[float]) -> float:
    """Aggregate for all other sets: mean of max(0, 1 - ratio), in [0, 1]; 1 is known well.

    Raises:
        ValueError: no ratio.
    """
    return mean([0.0 if ratio > 1 else 1 - ratio for ratio in ratios])  # NaN stays NaN


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test on truth ratios (section 2.2.3).

    The paper reports its logarithm; OpenUnlearning, as here, the p-value.

    Args:
        ratios: of the model under test, on the forget set.
        reference: of a model trained without the forget set, on the same examples.

    Raises:
        ValueError: no ratio on one of the sides.
    """
    from scipy.stats import ks_2samp

    if not ratios or not reference:
        raise ValueError(
            f"{len(ratios)} truth ratios against {len(reference)}: expected at least 1 each"
        )
    return float(ks_2samp(list(ratios), list(reference)).pvalue)
