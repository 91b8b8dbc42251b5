"""One metric's entry in OpenUnlearning's shape, and the two files that hold them.

An entry has "agg_value" and, where the metric has a value per question, "value_by_index", keyed by
the question's place in its set as a string. Membership attacks have such an entry for each side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from libortho.evaluation.metrics import (
    UTILITY_PARTS,
    broken_words,
    closer_to_one_better,
    exact_memorization,
    extraction_strength,
    has_loop,
    has_words,
    loss_score,
    membership_auc,
    min_k_plus_plus_score,
    min_k_score,
    model_utility,
    normalised_probability,
    probability,
    rouge_scores,
    true_better,
    truth_ratio,
    zlib_score,
)
from libortho.evaluation.scored import ANSWER, PERTURBED, Part, Scored
from libortho.files import write_json
from libortho.scoring import TokenStatistics, perplexity

Entry: TypeAlias = dict[str, Any]


def number(value: float | None) -> float:
    """A value of an entry; NaN where a file has null, which stands there for what is not finite."""
    return math.nan if value is None else float(value)


def write_openunlearning(logs: Mapping[str, Entry], folder: Path) -> None:
    """Write `TOFU_EVAL.json`, all entries, and `TOFU_SUMMARY.json`, their aggregates, by name.

    OpenUnlearning's summary leaves out what it computed only for another metric's sake; here every
    aggregate is in it.
    """
    ordered = dict(sorted(logs.items()))
    aggregates = {name: entry.get("agg_value") for name, entry in ordered.items()}
    summary = {name: value for name, value in aggregates.items() if value is not None}
    write_json(folder / "TOFU_EVAL.json", ordered, indent=4)
    write_json(folder / "TOFU_SUMMARY.json", summary, indent=4)


def probabilities(part: Part, kind: str, scored: Scored) -> Entry:
    """{"prob", "avg_loss"} of each answer, lists of them for perturbed answers."""
    rows = [
        {"prob": [probability(loss) for loss in losses], "avg_loss": losses}
        for losses in scored.losses(part, kind)
    ]
    aggregate = _mean([_mean(row["prob"]) for row in rows])
    if kind == PERTURBED:
        return _entry(aggregate, part.index, rows)
    single = [{key: values[0] for key, values in row.items()} for row in rows]
    return _entry(aggregate, part.index, single)


def normalised(part: Part, scored: Scored) -> Entry:
    """{"prob"}: of the answer among the answer and the perturbed ones."""
    pairs = zip(scored.losses(part, ANSWER), scored.losses(part, PERTURBED), strict=True)
    values = [
        normalised_probability(probability(right), [probability(loss) for loss in wrong])
        for (right,), wrong in pairs
    ]
    return _scores(part.index, values, key="prob")


def truth_ratios(part: Part, right_kind: str, scored: Scored) -> Entry:
    """{"score"}: the truth ratio; aggregated as the forget set or as the others are."""
    pairs = zip(scored.losses(part, right_kind), scored.losses(part, PERTURBED), strict=True)
    values = [truth_ratio(right, wrong) for (right,), wrong in pairs]
    aggregate = closer_to_one_better if part.name == "forget" else true_better
    return _scores(part.index, values, aggregate=aggregate(values))


def extraction(part: Part, scored: Scored) -> Entry:
    """{"score"}: extraction strength."""
    return _scores(
        part.index, [extraction_strength(s.greedy.tolist()) for s in scored.answer(part)]
    )


def memorization(part: Part, scored: Scored) -> Entry:
    """{"score"}: exact memorisation, None for an empty answer, which the aggregate leaves out."""
    values = [exact_memorization(s.greedy.tolist()) for s in scored.answer(part)]
    defined = [value for value in values if value is not None]
    return _entry(
        _mean(defined) if defined else None, part.index, [{"score": value} for value in values]
    )


Attack: TypeAlias = Callable[[TokenStatistics, str], float]

ATTACKS: dict[str, Attack] = {
    "mia_loss": lambda s, text: loss_score(s.nll.tolist()),
    "mia_zlib": lambda s, text: zlib_score(s.nll.tolist(), text),
    "mia_min_k": lambda s, text: min_k_score(s.nll.tolist()),
    "mia_min_k_plus_plus": lambda s, text: min_k_plus_plus_score(
        s.nll.tolist(), s.mean.tolist(), s.variance.tolist()
    ),
}


def membership(forget: Part, holdout: Part, attack: Attack, scored: Scored) -> Entry:
    """One attack: {"score"} of each side's questions, and the AUC between them."""
    sides = {
        name: [
            attack(statistics, text)
            for statistics, text in zip(scored.answer(part), scored.texts[part.name], strict=True)
        ]
        for name, part in (("forget", forget), ("holdout", holdout))
    }
    finite = all(map(math.isfinite, (*sides["forget"], *sides["holdout"])))
    # A model that gives NaN is measured to the end all the same: its other entries say so.
    auc = membership_auc(sides["forget"], sides["holdout"]) if finite else math.nan
    return {
        "forget": _scores(forget.index, sides["forget"]),
        "holdout": _scores(holdout.index, sides["holdout"]),
        "auc": auc,
        "agg_value": auc,
    }


def rouge(part: Part, inputs: Sequence[str], said: Sequence[str]) -> Entry:
    """ROUGE of each generated answer, prompt and both answers beside it; ROUGE-L recall on top.

    NaN on top where no right answer has a word to ROUGE, which would make it 0 whatever was said.
    """
    rows: list[Entry] = []
    for example, prompt, answer in zip(part.examples, inputs, said, strict=True):
        truth = example.answer.strip()
        texts = {"input": prompt, "ground_truth": truth, "generation": answer}
        rows.append({**rouge_scores(truth, answer), **texts})
    counts = any(has_words(row["ground_truth"]) for row in rows)
    recall = _mean([row["rougeL_recall"] for row in rows]) if counts else math.nan
    return _entry(recall, part.index, rows)


def utility(logs: Mapping[str, Entry]) -> Entry:
    """Model utility of the nine entries."""
    return {"agg_value": model_utility({name: logs[name]["agg_value"] for name in UTILITY_PARTS})}


def perplexity_entry(nll: Sequence[Tensor]) -> Entry:
    """Perplexity over all tokens of some sequences."""
    return {"agg_value": perplexity(nll)}


def fluency(index: Sequence[int], nll: Sequence[Tensor]) -> Entry:
    """Perplexity over all tokens of what was said, {"perplexity", "tokens"} of each answer."""
    rows = [{"perplexity": perplexity([x]), "tokens": len(x)} for x in nll]
    return _entry(perplexity(nll), index, rows)


def loops(part: Part, said: Sequence[str]) -> Entry:
    """{"score"}: 1 for an answer with a loop; the share of them on top."""
    return _scores(part.index, [float(has_loop(answer)) for answer in said])


def broken(part: Part, said: Sequence[str], known: Set[str]) -> Entry:
    """{"score", "words"}: 1 for an answer with broken words, and these; their share on top."""
    rows: list[Entry] = []
    for answer in said:
        words = broken_words(answer, known)
        rows.append({"score": float(bool(words)), "words": words})
    return _entry(_mean([row["score"] for row in rows]), part.index, rows)


def _scores(
    index: Sequence[int],
    values: Sequence[float],
    *,
    aggregate: float | None = None,
    key: str = "score",
) -> Entry:
    on_top = _mean(values) if aggregate is None else aggregate
    return _entry(on_top, index, [{key: value} for value in values])


def _entry(aggregate: float | None, index: Sequence[int], rows: Sequence[Entry]) -> Entry:
    by_index = {str(i): row for i, row in zip(index, rows, strict=True)}
    return {"agg_value": aggregate, "value_by_index": by_index}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
