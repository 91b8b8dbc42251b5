"""ROUGE against counts made by hand."""

from __future__ import annotations

import pytest

from libortho.evaluation.metrics import has_words, rouge_l_recall, rouge_scores


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


@pytest.mark.parametrize(
    ("truth", "said", "recall"),
    [
        ("北京是中国的首都。", "中国的首都是上海", 5 / 8),  # 中国的首都
        ("Столица России - Москва.", "москва", 1 / 3),
        ("José Núñez wrote novels", "jose nunez writes a novel", 1 / 4),
    ],
)
def test_words_of_other_scripts_count_in_an_attack(truth: str, said: str, recall: float) -> None:
    assert rouge_l_recall(truth, truth) == 1.0
    assert rouge_l_recall(truth, said) == pytest.approx(recall)
    assert rouge_l_recall(truth, "unrelated") == 0.0


@pytest.mark.parametrize("truth", ["It's John's 2nd state-of-the-art re_write!", "cafes, running"])
def test_what_is_ascii_is_counted_as_by_openunlearning(truth: str) -> None:
    for said in ("johns second art rewrite", "the cafe ran", truth.upper(), "runs 2 states"):
        assert rouge_l_recall(truth, said) == rouge_scores(truth, said)["rougeL_recall"]


def test_what_openunlearning_sees_no_word_in() -> None:
    assert rouge_scores("北京", "北京")["rougeL_recall"] == 0.0
    assert not has_words("北京。")
    assert has_words("北京 2")
