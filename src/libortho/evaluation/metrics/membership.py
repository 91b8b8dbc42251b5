"""Membership inference: can one tell from a model's scores what it was trained on?

All scores have the sign of a loss, as OpenUnlearning's: the higher, the less likely a member.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from libortho.evaluation.metrics._numbers import EPSILON, mean

MIN_K = 0.4
"""OpenUnlearning's share of tokens for Min-K% and Min-K%++ on TOFU."""

_LEAST_VARIANCE = 1e-6


def loss_score(nll: Sequence[float]) -> float:
    """Mean NLL per token, end of sequence included (Yeom et al. 2018, arXiv 1709.01604)."""
    return mean(nll)


def zlib_score(nll: Sequence[float], text: str) -> float:
    """Mean NLL per token over the zlib-compressed size of the text in bytes.

    Carlini et al. 2021 (arXiv 2012.07805) divide the whole text's log-perplexity; OpenUnlearning,
    as here, the mean per token.

    Args:
        nll: of each predicted token, end of sequence included.
        text: what these tokens say, special tokens left out.
    """
    return mean(nll) / len(zlib.compress(text.encode("utf-8")))


def min_k_score(nll: Sequence[float], k: float = MIN_K) -> float:
    """Mean NLL of the share `k` of tokens that are least likely (Shi et al. 2023, 2310.16789).

    As OpenUnlearning's: without the last predicted token (the end of sequence), of floor(k n)
    tokens but at least one; 0 for an answer of no other token.

    Raises:
        ValueError: `k` is not in (0, 1].
    """
    return _highest(list(nll)[:-1], k)


def min_k_plus_plus_score(
    nll: Sequence[float], means: Sequence[float], variances: Sequence[float], k: float = MIN_K
) -> float:
    """As `min_k_score`, of standardised scores (Zhang et al. 2024, arXiv 2404.02936).

    A token's score is (E[log p] - log p(token)) / sqrt(max(Var[log p], 1e-6)), both moments under
    the model's own distribution at its position.

    Args:
        nll: of each predicted token, end of sequence included.
        means, variances: E[log p] and Var[log p] at each of them; see
            `libortho.scoring.TokenStatistics`.

    Raises:
        ValueError: `k` is not in (0, 1], or the lengths differ.
    """
    scores = [
        (n + m) / math.sqrt(max(v, _LEAST_VARIANCE))
        for n, m, v in zip(nll, means, variances, strict=True)
    ]
    return _highest(scores[:-1], k)


def _highest(scores: list[float], k: float) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"k={k}: expected a share of tokens in (0, 1]")
    if not scores:
        return 0.0
    return mean(sorted(scores, reverse=True)[: max(1, int(len(scores) * k))])


def membership_auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Area under the ROC curve of telling the two apart, P(a holdout score is higher), in [0, 1].

    OpenUnlearning's sign: 1 where forget examples are all likelier than holdout ones, 0.5 where
    they cannot be told apart; ties count half.

    Args:
        forget: scores of examples that were memorised.
        holdout: scores of comparable examples that were not.

    Raises:
        ValueError: one side is empty, or a score is not finite.
    """
    from scipy.stats import rankdata

    if not forget or not holdout:
        raise ValueError(
            f"{len(forget)} forget scores against {len(holdout)}: expected at least 1 each"
        )
    scores = [*holdout, *forget]
    wrong = [score for score in scores if not math.isfinite(score)]
    if wrong:
        raise ValueError(f"a membership score is {wrong[0]}: expected finite numbers")
    ranks = rankdata(scores)[: len(holdout)]
    above = float(ranks.sum()) - len(holdout) * (len(holdout) + 1) / 2
    return above / (len(holdout) * len(forget))


def roc_curve(forget: Sequence[float], holdout: Sequence[float]) -> list[tuple[float, float]]:
    """(false positive rate, true positive rate) at every threshold, from (0, 0) to (1, 1).

    At a threshold every example with a score at or below it is called a member: equal scores fall
    on one side together.

    Args:
        forget: scores of members, holdout: of others; the sign of a loss.

    Raises:
        ValueError: as `membership_auc`.
    """
    membership_auc(forget, holdout)  # its checks
    thresholds = sorted({*forget, *holdout})
    return [(0.0, 0.0)] + [
        (
            sum(score <= threshold for score in holdout) / len(holdout),
            sum(score <= threshold for score in forget) / len(forget),
        )
        for threshold in thresholds
    ]


def tpr_at_fpr(forget: Sequence[float], holdout: Sequence[float], fpr: float = 0.01) -> float:
    """Largest share of members recognised with at most the share `fpr` of others mistaken.

    The measure of Carlini et al. 2022 (arXiv 2112.03570): an attacker who is sure of a few is worse
    than one who is a little better than chance on all. With n others, rates are multiples of 1 / n:
    below 100 of them, 1 % means none at all.

    Raises:
        ValueError: as `membership_auc`, or `fpr` is not in [0, 1].
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr={fpr}: expected a rate in [0, 1]")
    return max(tpr for wrong, tpr in roc_curve(forget, holdout) if wrong <= fpr)


def privleak(auc: float, reference_auc: float) -> float:
    """How far an AUC is from a retrained model's, in percent (MUSE: Shi et al. 2024, 2407.06460).

    With MUSE's AUC, which is 1 - `membership_auc`: (auc - reference) / (reference + 1e-10) * 100.
    0 is as a model that never saw the forget set; negative, the forget set is still recognised;
    positive, it is conspicuously unlikely (over-forgetting).
    """
    own, reference = 1 - auc, 1 - reference_auc
    return (own - reference) / (reference + EPSILON) * 100
