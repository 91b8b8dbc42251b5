"""Answer probability (TOFU: Maini et al. 2024, arXiv 2401.06121, section 2.2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from libortho.evaluation.metrics._numbers import EPSILON


def probability(loss: float) -> float:
    """P(answer | question)^(1 / tokens), in [0, 1].

    Args:
        loss: mean NLL of the answer's tokens, end of sequence included, nats.
    """
    return math.exp(-loss)


def normalised_probability(right: float, wrong: Sequence[float]) -> float:
    """The right answer's probability among the options: right / (right + sum of wrong), in [0, 1].

    What TOFU reports for real authors and world facts, whose right answer a model knows in another
    form than the file's. As OpenUnlearning's `probability_w_options`: of per-token probabilities,
    with 1e-10 added to the denominator.

    Args:
        right: `probability` of the right answer.
        wrong: `probability` of each wrong one.

    Raises:
        ValueError: no wrong answer.
    """
    if not wrong:
        raise ValueError("no wrong answer was given: a probability among options needs at least 1")
    return right / (right + sum(wrong) + EPSILON)
