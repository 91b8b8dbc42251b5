"""The suite: what it measures, on how much, what it leaves out, and that it says so."""

from __future__ import annotations

import dataclasses

import pytest

from libortho.data import Example
from libortho.evaluation.compare import with_reference
from libortho.evaluation.suite import SuiteConfig, evaluate_suite
from libortho.evaluation.suite_data import SuiteData

THEIRS = {
    *(f"{p}_Q_A_{m}" for p in ("forget", "retain", "ra", "wf") for m in ("Prob", "PERT_Prob")),
    *(f"{p}_Q_A_PARA_Prob" for p in ("forget", "retain")),
    *(f"{p}_Q_A_ROUGE" for p in ("forget", "retain", "ra", "wf")),
    *(f"{p}_Q_A_Prob_normalised" for p in ("ra", "wf")),
    *("forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio", "wf_Truth_Ratio"),
    *("extraction_strength", "exact_memorization", "model_utility"),
    *("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"),
}
OURS = {
    *("forget_perplexity", "retain_perplexity", "wikitext_perplexity", "forget_fluency"),
    *(f"{p}_{m}" for p in ("forget", "retain") for m in ("loops", "broken_words")),
}


def test_every_metric_has_its_name(evaluation) -> None:
    assert set(evaluation.logs) == THEIRS | OURS
    assert set(evaluation.missing) == {"forget_quality", "privleak"}
    assert all(isinstance(entry["agg_value"], float) for entry in evaluation.logs.values())


def test_loops_and_broken_words(model, tokenizer, monkeypatch, data, values) -> None:
    said = {5: "red " * 9, 6: "the Ba-z-q house qzzx", 7: "The garden of Zzyx", 8: ""}
    answers = [said[5], said[6], said[7], said[8], "a garden"]
    monkeypatch.setattr(
        "libortho.evaluation.suite.greedy", lambda *a, **k: (answers * 5)[: len(a[2])]
    )
    logs = evaluate_suite(model, tokenizer, data, pretrained=model).logs
    assert values(logs["forget_loops"], "score") == [1, 0, 0, 0, 0]
    assert logs["forget_loops"]["agg_value"] == pytest.approx(0.2)
    assert values(logs["forget_broken_words"], "words") == [[], ["Ba-z-q", "qzzx"], [], [], []]
    assert logs["forget_broken_words"]["agg_value"] == pytest.approx(0.2)
    assert list(logs["forget_fluency"]["value_by_index"]) == ["0", "1", "2", "4"]  # not the empty


def test_a_limit_is_spread_and_recorded(model, tokenizer, data) -> None:
    whole = evaluate_suite(model, tokenizer, data, SuiteConfig(max_new_tokens=2))
    some = evaluate_suite(model, tokenizer, data, SuiteConfig(limit=3, max_new_tokens=2))
    assert some.settings["limit"] == 3
    assert some.settings["questions"]["retain"] == {"asked": 3, "of": 7}
    assert some.settings["questions"]["forget"] == {"asked": 5, "of": 5}
    for name in ("retain_Q_A_Prob", "retain_Truth_Ratio", "retain_Q_A_ROUGE"):
        rows, every = some.logs[name]["value_by_index"], whole.logs[name]["value_by_index"]
        assert list(rows) == ["0", "3", "4"]
        for index, row in rows.items():
            for key, value in row.items():
                assert value == (
                    every[index][key]
                    if isinstance(value, str)
                    else pytest.approx(every[index][key], rel=1e-4)
                )
    assert len(some.logs["forget_Q_A_Prob"]["value_by_index"]) == 5
    assert len(some.logs["mia_loss"]["holdout"]["value_by_index"]) == 4


def test_what_cannot_be_computed_is_named(model, tokenizer, examples) -> None:
    bare = SuiteData(
        forget=examples(2, 0),
        retain=(*examples(1, 1), Example("a house", "where ?")),
        absent={"holdout": "nobody is left", "retain": "stale"},
    )
    evaluation = evaluate_suite(model, tokenizer, bare, SuiteConfig(max_new_tokens=2))
    missing = evaluation.missing
    assert not set(missing) & set(evaluation.logs)
    assert set(missing) | set(evaluation.logs) == THEIRS | OURS | {"forget_quality", "privleak"}
    assert missing["mia_min_k"] == "nobody is left"
    assert missing["ra_Q_A_Prob"] == "the set real_authors is empty"
    reason = "1 of 2 questions of retain have no paraphrased answer"
    assert missing["retain_Q_A_PARA_Prob"] == missing["retain_Truth_Ratio"] == reason
    assert missing["model_utility"] == f"needs retain_Truth_Ratio: {reason}"
    assert "no general text" in missing["wikitext_perplexity"]
    assert "no pretrained model" in missing["forget_fluency"]
    assert "no reference" in missing["forget_quality"]
    compared = with_reference(evaluation, evaluation.logs)
    assert compared.logs["forget_quality"]["agg_value"] == pytest.approx(1.0)
    assert compared.missing["privleak"] == "nobody is left"


def test_each_sequence_is_scored_once(model, tokenizer, monkeypatch, data) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(of, items, **rest):  # type: ignore[no-untyped-def]
        seen.extend(item.ids for item in items)
        return token_statistics(of, items, **rest)

    from libortho.scoring import token_statistics

    monkeypatch.setattr("libortho.evaluation.scored.token_statistics", spy)
    # A paraphrase that is the answer, and a holdout question that is a forget question.
    forget = tuple(dataclasses.replace(e, paraphrased_answer=e.answer) for e in data.forget)
    data = dataclasses.replace(data, forget=forget, holdout=forget[:2], wikitext=None)
    stages: list[str] = []
    evaluate_suite(
        model,
        tokenizer,
        data,
        SuiteConfig(max_new_tokens=1),
        progress=lambda s, done, of: stages.append(s),
    )
    assert len(seen) == len(set(seen)) > 40
    assert stages[0] == "score"
    assert "answer" in stages


def test_the_quick_suite_is_a_part_of_the_whole_and_says_so(model, tokenizer, data) -> None:
    whole = evaluate_suite(model, tokenizer, data, SuiteConfig(max_new_tokens=2))
    quick = evaluate_suite(model, tokenizer, data, SuiteConfig(quick=True))
    assert set(quick.logs) < set(whole.logs)
    for name, entry in quick.logs.items():
        assert entry["agg_value"] == pytest.approx(whole.logs[name]["agg_value"])
    assert set(whole.logs) <= set(quick.logs) | set(quick.missing)
    assert quick.missing["model_utility"] == "not part of the quick suite"
    assert quick.missing["retain_Truth_Ratio"] == "not part of the quick suite"
