"""The metrics of the TOFU benchmark: pure functions of numbers and strings, one paper each.

Where OpenUnlearning (Dorna et al. 2025, arXiv 2506.12618) defines one otherwise than its paper,
OpenUnlearning is followed and the docstring says so. `libortho.evaluation.suite` computes them.
"""

from libortho.evaluation.metrics.fluency import broken_words, has_loop, token_words, vocabulary
from libortho.evaluation.metrics.membership import (
    MIN_K,
    loss_score,
    membership_auc,
    min_k_plus_plus_score,
    min_k_score,
    privleak,
    roc_curve,
    tpr_at_fpr,
    zlib_score,
)
from libortho.evaluation.metrics.memorisation import exact_memorization, extraction_strength
from libortho.evaluation.metrics.probability import normalised_probability, probability
from libortho.evaluation.metrics.rouge import has_words, rouge_l_recall, rouge_scores
from libortho.evaluation.metrics.truth_ratio import (
    closer_to_one_better,
    forget_quality,
    true_better,
    truth_ratio,
)
from libortho.evaluation.metrics.utility import UTILITY_PARTS, model_utility

__all__ = [
    "MIN_K",
    "UTILITY_PARTS",
    "broken_words",
    "closer_to_one_better",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "has_loop",
    "has_words",
    "loss_score",
    "membership_auc",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "normalised_probability",
    "privleak",
    "probability",
    "roc_curve",
    "rouge_l_recall",
    "rouge_scores",
    "token_words",
    "tpr_at_fpr",
    "true_better",
    "truth_ratio",
    "vocabulary",
    "zlib_score",
]
