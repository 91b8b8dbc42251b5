"""ROUGE against counts made by hand."""

from __future__ import annotations

import pytest

from libortho.evaluation.metrics import rouge_l_recall, rouge_scores


def test_rouge() -> None:
    truth, said = "the author was born in Kuwait City", "in Kuwait the author was famous"
    # Longest common subsequence "the author was" of 7 and 6 words; 5 words in common.
    scores = rouge_scores(truth, said)
    assert scores == pytest.approx(
        {"rouge1_recall": 5 / 7, "rougeL_recall": 3 / 7, "rougeL_f1": 2 * 3 / (7 + 6)}
    )
    assert rouge_l_recall(truth, said) == scores["rougeL_recall"]


def test_rouge_is_of_stems_without_case_and_punctuation() -> None:
    assert rouge_l_recall("She writes novels.", "she WRITING novel") == 1.0
    assert rouge_l_recall("She writes novels.", "") == 0.0
