"""ROUGE of a generated answer (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

As OpenUnlearning computes it: the `rouge-score` package, with its Porter stemmer.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge_scores(truth: str, said: str) -> dict[str, float]:
    """ "rouge1_recall", "rougeL_f1" and "rougeL_recall" of `said` against `truth`, in [0, 1]."""
    scores = _scorer().score(truth, said)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
        "rougeL_recall": float(scores["rougeL"].recall),
    }


def rouge_l_recall(truth: str, said: str) -> float:
    """Share of the truth's words that `said` has in the same order, in [0, 1] (TOFU, 2.2.1)."""
    return rouge_scores(truth, said)["rougeL_recall"]
