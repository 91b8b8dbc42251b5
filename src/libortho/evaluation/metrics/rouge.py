"""ROUGE of a generated answer (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

By the `rouge-score` package, with its Porter stemmer, as OpenUnlearning computes it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
"""Scripts without spaces between words: each character counts as one."""

_WORDS = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


@cache
def _scorer_of_all_scripts() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

    class AllScripts(Tokenizer):  # type: ignore[misc]
        _latin = DefaultTokenizer(use_stemmer=True)

        def tokenize(self, text: str) -> list[str]:
            return [
                token
                for word in _WORDS.findall(text.lower())
                for token in (self._latin.tokenize(word) if word.isascii() else [word])
            ]

    return RougeScorer(["rougeL"], tokenizer=AllScripts())


def has_words(text: str) -> bool:
    """Whether `rouge_scores` sees anything in a text: to it, a word is of a-z and digits."""
    return re.search("[a-z0-9]", text.lower()) is not None


def rouge_scores(truth: str, said: str) -> dict[str, float]:
    """ "rouge1_recall", "rougeL_f1" and "rougeL_recall" of `said` against `truth`, in [0, 1].

    OpenUnlearning's, to which all but a-z and digits are spaces; see `has_words`.
    """
    scores = _scorer().score(truth, said)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
        "rougeL_recall": float(scores["rougeL"].recall),
    }


def rouge_l_recall(truth: str, said: str) -> float:
    """Share of the truth's words that `said` has in the same order, in [0, 1] (TOFU, 2.2.1).

    Of text in ASCII it is `rouge_scores`'; words of other scripts count as well, for an answer in
    Chinese that is recited in full would otherwise score 0.
    """
    return float(_scorer_of_all_scripts().score(truth, said)["rougeL"].recall)
