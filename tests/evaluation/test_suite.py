"""The suite on tiny models: every value against its definition, every name against the list."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import hmean, ks_2samp

from libortho.data import Example, Task, encode
from libortho.data.tokens import prompt_ids
from libortho.evaluation.entries import write_openunlearning
from libortho.evaluation.generation import greedy
from libortho.evaluation.metrics import rouge_l_recall
from libortho.evaluation.suite import (
    Evaluation,
    SuiteConfig,
    SuiteData,
    evaluate_suite,
    with_reference,
)

WORDS = ["who", "wrote", "where", "is", "the", "a", "red", "house", "in", "garden", "she", "he"]
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


def examples(count: int, seed: int, *, paraphrased: bool = True) -> tuple[Example, ...]:
    generator = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(generator.choice(WORDS, generator.integers(low, high)))

    return tuple(
        Example(
            answer=words(2, 7),
            question=words(2, 6) + " ?",
            paraphrased_answer=words(2, 7) if paraphrased else None,
            perturbed_answers=tuple(words(2, 7) for _ in range(3)),
        )
        for _ in range(count)
    )


DATA = SuiteData(
    forget=examples(5, 0),
    retain=examples(7, 1),
    holdout=examples(4, 2, paraphrased=False),
    real_authors=examples(3, 3, paraphrased=False),
    world_facts=examples(3, 4, paraphrased=False),
    wikitext="the red house is in the garden . " * 3,
)


@pytest.fixture
def model(tiny_llama):  # type: ignore[no-untyped-def]
    return tiny_llama(vocab_size=24)


@pytest.fixture
def other(tiny_llama):  # type: ignore[no-untyped-def]
    made = tiny_llama(vocab_size=24)
    for parameter in made.parameters():
        parameter.mul_(0.7)
    return made


@pytest.fixture
def evaluation(model, other, tokenizer) -> Evaluation:  # type: ignore[no-untyped-def]
    return evaluate_suite(model, tokenizer, DATA, SuiteConfig(max_new_tokens=6), pretrained=other)


class Reference:
    """The same quantities, one sequence at a time, in float64."""

    def __init__(self, model, tokenizer) -> None:  # type: ignore[no-untyped-def]
        self.model, self.tokenizer = model, tokenizer

    def log_p(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """((targets, vocabulary) log-probabilities, (targets,) labels)."""
        item = encode(Example(answer, question), self.tokenizer)
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([item.ids])).logits[0].double()
        rows = logits.log_softmax(-1)[item.prompt - 1 : -1].numpy()
        return rows, np.array(item.ids[item.prompt :])

    def nll(self, question: str, answer: str) -> np.ndarray:
        rows, labels = self.log_p(question, answer)
        return -rows[np.arange(len(labels)), labels]

    def loss(self, example: Example, answer: str) -> float:
        return float(self.nll(example.question or "", answer).mean())

    def said(self, questions, steps: int) -> list[str]:  # type: ignore[no-untyped-def]
        prompts = [prompt_ids(e.question, "plain", self.tokenizer) for e in questions]
        return greedy(self.model, self.tokenizer, prompts, steps)


@pytest.fixture
def reference(model, tokenizer) -> Reference:  # type: ignore[no-untyped-def]
    return Reference(model, tokenizer)


def values(entry: dict[str, object], key: str) -> list[float]:
    return [row[key] for row in entry["value_by_index"].values()]  # type: ignore[attr-defined]


def test_every_metric_has_its_name(evaluation: Evaluation) -> None:
    assert set(evaluation.logs) == THEIRS | OURS
    assert set(evaluation.missing) == {"forget_quality", "privleak"}
    assert all(isinstance(entry["agg_value"], float) for entry in evaluation.logs.values())


def test_probabilities(evaluation: Evaluation, reference: Reference) -> None:
    sets = {"forget": DATA.forget, "retain": DATA.retain, "ra": DATA.real_authors}
    for prefix, asked in sets.items():
        entry = evaluation.logs[f"{prefix}_Q_A_Prob"]
        losses = [reference.loss(e, e.answer) for e in asked]
        assert list(entry["value_by_index"]) == [str(i) for i in range(len(asked))]
        assert values(entry, "avg_loss") == pytest.approx(losses, rel=1e-4)
        assert values(entry, "prob") == pytest.approx(np.exp(-np.array(losses)), rel=1e-4)
        assert entry["agg_value"] == pytest.approx(np.exp(-np.array(losses)).mean(), rel=1e-4)
        wrong = np.array([[reference.loss(e, w) for w in e.perturbed_answers] for e in asked])
        entry = evaluation.logs[f"{prefix}_Q_A_PERT_Prob"]
        np.testing.assert_allclose(values(entry, "avg_loss"), wrong, rtol=1e-4)
        assert entry["agg_value"] == pytest.approx(np.exp(-wrong).mean(), rel=1e-4)
        if prefix == "ra":
            right = np.exp(-np.array(losses))
            share = right / (right + np.exp(-wrong).sum(1))
            entry = evaluation.logs["ra_Q_A_Prob_normalised"]
            assert values(entry, "prob") == pytest.approx(share, rel=1e-4)
            assert entry["agg_value"] == pytest.approx(share.mean(), rel=1e-4)


def test_truth_ratios(evaluation: Evaluation, reference: Reference) -> None:
    for name, asked, paraphrased in (
        ("forget_truth_ratio", DATA.forget, True),
        ("retain_Truth_Ratio", DATA.retain, True),
        ("wf_Truth_Ratio", DATA.world_facts, False),
    ):
        ratios = np.array(
            [
                math.exp(
                    reference.loss(e, (e.paraphrased_answer if paraphrased else e.answer) or "")
                    - np.mean([reference.loss(e, w) for w in e.perturbed_answers])
                )
                for e in asked
            ]
        )
        entry = evaluation.logs[name]
        assert values(entry, "score") == pytest.approx(ratios, rel=1e-3)
        better = np.minimum(ratios, 1 / ratios) if paraphrased and asked is DATA.forget else None
        expected = np.maximum(0, 1 - ratios) if better is None else better
        assert entry["agg_value"] == pytest.approx(expected.mean(), rel=1e-3)


def test_utility_is_of_the_nine(evaluation: Evaluation) -> None:
    logs = evaluation.logs
    nine = [logs[f"retain_{m}"]["agg_value"] for m in ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio")]
    nine += [
        logs[f"{p}_{m}"]["agg_value"]
        for p in ("ra", "wf")
        for m in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
    ]
    assert logs["model_utility"]["agg_value"] == pytest.approx(float(hmean(nine)))


def test_memorisation_and_membership(evaluation: Evaluation, reference: Reference) -> None:
    logs = evaluation.logs
    exact, strength, plus, low = [], [], [], []
    for example in DATA.forget:
        rows, labels = reference.log_p(example.question or "", example.answer)
        p, hits = np.exp(rows), (rows.argmax(1) == labels)[:-1]
        exact.append(hits.mean())
        starts = [k for k in range(len(hits)) if hits[k:].all()]
        strength.append(1 - (starts[0] if starts else len(hits) - 1) / len(hits))
        mean = (p * rows).sum(1)
        deviation = np.sqrt((p * rows**2).sum(1) - mean**2)
        own = rows[np.arange(len(labels)), labels]
        count = max(1, int(0.4 * len(hits)))
        low.append(-np.sort(own[:-1])[:count].mean())
        plus.append(-np.sort(((own - mean) / deviation)[:-1])[:count].mean())
    assert values(logs["exact_memorization"], "score") == pytest.approx(exact)
    assert values(logs["extraction_strength"], "score") == pytest.approx(strength)
    assert logs["extraction_strength"]["agg_value"] == pytest.approx(np.mean(strength))
    assert values(logs["mia_min_k"]["forget"], "score") == pytest.approx(low, rel=1e-4)
    assert values(logs["mia_min_k_plus_plus"]["forget"], "score") == pytest.approx(plus, rel=1e-3)
    sides = {}
    for side, asked in (("forget", DATA.forget), ("holdout", DATA.holdout)):
        losses = [reference.loss(e, e.answer) for e in asked]
        assert values(logs["mia_loss"][side], "score") == pytest.approx(losses, rel=1e-4)
        assert logs["mia_loss"][side]["agg_value"] == pytest.approx(np.mean(losses), rel=1e-4)
        sizes = [len(zlib.compress(e.answer.encode())) for e in asked]
        sides[side] = np.array(losses) / sizes
        assert values(logs["mia_zlib"][side], "score") == pytest.approx(sides[side], rel=1e-4)
    auc = np.mean([h > f for h in sides["holdout"] for f in sides["forget"]])
    assert logs["mia_zlib"]["auc"] == logs["mia_zlib"]["agg_value"] == pytest.approx(auc)


def test_answers_are_kept(evaluation: Evaluation, reference: Reference, tokenizer) -> None:
    for prefix, asked in (("forget", DATA.forget), ("wf", DATA.world_facts)):
        entry = evaluation.logs[f"{prefix}_Q_A_ROUGE"]
        said = reference.said(asked, 6)
        assert values(entry, "generation") == said
        assert values(entry, "ground_truth") == [e.answer for e in asked]
        recalls = [rouge_l_recall(e.answer, s) for e, s in zip(asked, said, strict=True)]
        assert values(entry, "rougeL_recall") == pytest.approx(recalls)
        assert entry["agg_value"] == pytest.approx(np.mean(recalls))
        first = entry["value_by_index"]["0"]
        assert set(first) == {
            *("rouge1_recall", "rougeL_f1", "rougeL_recall"),
            *("input", "ground_truth", "generation"),
        }
        assert asked[0].question in first["input"]
        assert "<s>" not in first["input"]


def test_perplexities_and_fluency(evaluation, reference, other, tokenizer) -> None:
    logs = evaluation.logs
    for name in ("forget", "retain"):
        nll = [reference.nll(e.question or "", e.answer) for e in DATA.sets()[name]]
        expected = math.exp(np.concatenate(nll).mean())
        assert logs[f"{name}_perplexity"]["agg_value"] == pytest.approx(expected, rel=1e-4)
    said = reference.said(DATA.forget, 6)
    judge = Reference(other, tokenizer)
    # Judged by the other model, without the end of sequence.
    nll = [judge.nll(e.question or "", s)[:-1] for e, s in zip(DATA.forget, said, strict=True) if s]
    entry = logs["forget_fluency"]
    assert entry["agg_value"] == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-4)
    assert values(entry, "tokens") == [len(x) for x in nll]
    assert values(entry, "perplexity") == pytest.approx([math.exp(x.mean()) for x in nll], rel=1e-3)
    ids = torch.tensor([tokenizer(DATA.wikitext).input_ids])
    loss = float(reference.model(input_ids=ids, labels=ids).loss)
    assert logs["wikitext_perplexity"]["agg_value"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_loops_and_broken_words(model, tokenizer, monkeypatch) -> None:
    said = {5: "red " * 9, 6: "the Ba-z-q house qzzx", 7: "The garden of Zzyx", 8: ""}
    answers = [said[5], said[6], said[7], said[8], "a garden"]
    monkeypatch.setattr(
        "libortho.evaluation.suite.greedy", lambda *a, **k: (answers * 5)[: len(a[2])]
    )
    logs = evaluate_suite(model, tokenizer, DATA, pretrained=model).logs
    assert values(logs["forget_loops"], "score") == [1, 0, 0, 0, 0]
    assert logs["forget_loops"]["agg_value"] == pytest.approx(0.2)
    assert values(logs["forget_broken_words"], "words") == [[], ["Ba-z-q", "qzzx"], [], [], []]
    assert logs["forget_broken_words"]["agg_value"] == pytest.approx(0.2)
    assert list(logs["forget_fluency"]["value_by_index"]) == ["0", "1", "2", "4"]  # not the empty


def test_a_limit_is_spread_and_recorded(model, tokenizer) -> None:
    whole = evaluate_suite(model, tokenizer, DATA, SuiteConfig(max_new_tokens=2))
    some = evaluate_suite(model, tokenizer, DATA, SuiteConfig(limit=3, max_new_tokens=2))
    assert some.settings["limit"] == 3
    assert some.settings["questions"]["retain"] == {"asked": 3, "of": 7}
    assert some.settings["questions"]["forget"] == {"asked": 5, "of": 5}
    for name in ("retain_Q_A_Prob", "retain_Truth_Ratio", "retain_Q_A_ROUGE"):
        rows, every = some.logs[name]["value_by_index"], whole.logs[name]["value_by_index"]
        assert list(rows) == ["0", "2", "4"]
        for index, row in rows.items():
            for key, value in row.items():
                assert value == (
                    every[index][key]
                    if isinstance(value, str)
                    else pytest.approx(every[index][key], rel=1e-4)
                )
    assert len(some.logs["forget_Q_A_Prob"]["value_by_index"]) == 5
    assert len(some.logs["mia_loss"]["holdout"]["value_by_index"]) == 4


def test_what_cannot_be_computed_is_named(model, tokenizer) -> None:
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


def test_with_reference(evaluation: Evaluation, other, tokenizer) -> None:
    reference = evaluate_suite(other, tokenizer, DATA, SuiteConfig(max_new_tokens=2)).logs
    stored = json.loads(json.dumps(reference))
    compared = with_reference(evaluation, stored)
    ratios = [values(logs["forget_truth_ratio"], "score") for logs in (evaluation.logs, reference)]
    assert compared.logs["forget_quality"]["agg_value"] == pytest.approx(ks_2samp(*ratios).pvalue)
    own, their = (1 - x["mia_min_k"]["agg_value"] for x in (evaluation.logs, reference))
    assert compared.logs["privleak"]["agg_value"] == pytest.approx((own - their) / their * 100)
    assert compared.missing == {}
    assert "privleak" not in evaluation.logs  # not changed in place
    stored["forget_truth_ratio"]["value_by_index"].pop("0")
    with pytest.raises(ValueError, match="5 forget questions against the reference's 4"):
        with_reference(evaluation, stored)
    del stored["forget_truth_ratio"]
    assert with_reference(evaluation, stored).missing == {
        "forget_quality": "the reference's logs have no forget_truth_ratio"
    }


def test_files_are_openunlearnings(evaluation: Evaluation, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "alpha 0"
    write_openunlearning(evaluation.logs, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["TOFU_EVAL.json", "TOFU_SUMMARY.json"]
    text = (folder / "TOFU_EVAL.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(evaluation.logs))
    assert list(json.loads(text)) == sorted(evaluation.logs)
    assert '\n    "exact_memorization": {\n        "agg_value"' in text
    summary = json.loads((folder / "TOFU_SUMMARY.json").read_text())
    assert summary == {k: v["agg_value"] for k, v in sorted(evaluation.logs.items())}
    write_openunlearning({"x": {"agg_value": None}, "a": {"agg_value": 1.0}}, folder)
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text()) == {"a": 1.0}
    with pytest.raises(TypeError):
        write_openunlearning({"x": {"agg_value": object()}}, folder)
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text()) == {"a": 1.0}  # still whole
    assert len(list(folder.iterdir())) == 2


def test_each_sequence_is_scored_once(model, tokenizer, monkeypatch) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(of, items, **rest):  # type: ignore[no-untyped-def]
        seen.extend(item.ids for item in items)
        return token_statistics(of, items, **rest)

    from libortho.scoring import token_statistics

    monkeypatch.setattr("libortho.evaluation.scored.token_statistics", spy)
    # A paraphrase that is the answer, and a holdout question that is a forget question.
    forget = tuple(dataclasses.replace(e, paraphrased_answer=e.answer) for e in DATA.forget)
    data = dataclasses.replace(DATA, forget=forget, holdout=forget[:2], wikitext=None)
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


def test_data_of_a_task() -> None:
    task = Task(
        name="t",
        forget=DATA.forget,
        retain=(*DATA.retain, Example("a house", "where ?")),
        unseen=(),
        source="",
        real_authors=DATA.real_authors,
        absent={"unseen": "nobody is left", "world_facts": "no file"},
    )
    data = SuiteData.of_task(task, "text")
    assert data.retain == DATA.retain  # what has no perturbed answers is not measured
    assert data.wikitext == "text"
    assert data.absent == {"holdout": "nobody is left", "world_facts": "no file"}
    plain = dataclasses.replace(task, retain=(Example("a house", "where ?"),))
    assert SuiteData.of_task(plain).retain == plain.retain


def test_bad_input(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="the retain set is empty"):
        SuiteData(DATA.forget, ())
    with pytest.raises(ValueError, match=r"forget\[0\] has no question \('a text'\)"):
        SuiteData((Example("a text"),), DATA.retain)
    with pytest.raises(ValueError, match="limit=0"):
        SuiteConfig(limit=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        SuiteConfig(max_new_tokens=0)


def test_the_quick_suite_is_a_part_of_the_whole_and_says_so(model, tokenizer) -> None:
    whole = evaluate_suite(model, tokenizer, DATA, SuiteConfig(max_new_tokens=2))
    quick = evaluate_suite(model, tokenizer, DATA, SuiteConfig(quick=True))
    assert set(quick.logs) < set(whole.logs)
    for name, entry in quick.logs.items():
        assert entry["agg_value"] == pytest.approx(whole.logs[name]["agg_value"])
    assert set(whole.logs) <= set(quick.logs) | set(quick.missing)
    assert quick.missing["model_utility"] == "not part of the quick suite"
    assert quick.missing["retain_Truth_Ratio"] == "not part of the quick suite"
