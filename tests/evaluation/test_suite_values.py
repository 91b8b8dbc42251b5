"""The suite on a tiny model: every value against its definition, one sequence at a time."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from scipy.stats import hmean

from libortho.data import Example, encode
from libortho.data.tokens import prompt_ids
from libortho.evaluation.generation import greedy
from libortho.evaluation.metrics import rouge_l_recall


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


def test_probabilities(evaluation, reference, data, values) -> None:
    sets = {"forget": data.forget, "retain": data.retain, "ra": data.real_authors}
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


def test_truth_ratios(evaluation, reference, data, values) -> None:
    for name, asked, paraphrased in (
        ("forget_truth_ratio", data.forget, True),
        ("retain_Truth_Ratio", data.retain, True),
        ("wf_Truth_Ratio", data.world_facts, False),
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
        better = np.minimum(ratios, 1 / ratios) if paraphrased and asked is data.forget else None
        expected = np.maximum(0, 1 - ratios) if better is None else better
        assert entry["agg_value"] == pytest.approx(expected.mean(), rel=1e-3)


def test_utility_is_of_the_nine(evaluation) -> None:
    logs = evaluation.logs
    nine = [logs[f"retain_{m}"]["agg_value"] for m in ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio")]
    nine += [
        logs[f"{p}_{m}"]["agg_value"]
        for p in ("ra", "wf")
        for m in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
    ]
    assert logs["model_utility"]["agg_value"] == pytest.approx(float(hmean(nine)))


def test_memorisation_and_membership(evaluation, reference, data, values) -> None:
    logs = evaluation.logs
    exact, strength, plus, low = [], [], [], []
    for example in data.forget:
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
    for side, asked in (("forget", data.forget), ("holdout", data.holdout)):
        losses = [reference.loss(e, e.answer) for e in asked]
        assert values(logs["mia_loss"][side], "score") == pytest.approx(losses, rel=1e-4)
        assert logs["mia_loss"][side]["agg_value"] == pytest.approx(np.mean(losses), rel=1e-4)
        sizes = [len(zlib.compress(e.answer.encode())) for e in asked]
        sides[side] = np.array(losses) / sizes
        assert values(logs["mia_zlib"][side], "score") == pytest.approx(sides[side], rel=1e-4)
    auc = np.mean([h > f for h in sides["holdout"] for f in sides["forget"]])
    assert logs["mia_zlib"]["auc"] == logs["mia_zlib"]["agg_value"] == pytest.approx(auc)


def test_answers_are_kept(evaluation, reference, tokenizer, data, values) -> None:
    for prefix, asked in (("forget", data.forget), ("wf", data.world_facts)):
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


def test_perplexities_and_fluency(evaluation, reference, other, tokenizer, data, values) -> None:
    logs = evaluation.logs
    for name in ("forget", "retain"):
        nll = [reference.nll(e.question or "", e.answer) for e in data.sets()[name]]
        expected = math.exp(np.concatenate(nll).mean())
        assert logs[f"{name}_perplexity"]["agg_value"] == pytest.approx(expected, rel=1e-4)
    said = reference.said(data.forget, 6)
    judge = Reference(other, tokenizer)
    # Judged by the other model, without the end of sequence.
    nll = [judge.nll(e.question or "", s)[:-1] for e, s in zip(data.forget, said, strict=True) if s]
    entry = logs["forget_fluency"]
    assert entry["agg_value"] == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-4)
    assert values(entry, "tokens") == [len(x) for x in nll]
    assert values(entry, "perplexity") == pytest.approx([math.exp(x.mean()) for x in nll], rel=1e-3)
    ids = torch.tensor([tokenizer(data.wikitext).input_ids])
    loss = float(reference.model(input_ids=ids, labels=ids).loss)
    assert logs["wikitext_perplexity"]["agg_value"] == pytest.approx(math.exp(loss), rel=1e-3)
