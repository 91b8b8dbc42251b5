"""A model's measurements as one row of a table, and rows of several seeds as one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from libortho.evaluation.entries import Entry

MEASURES = {
    "forget_probability": "forget_Q_A_Prob",
    "retain_probability": "retain_Q_A_Prob",
    "forget_perplexity": "forget_perplexity",
    "retain_perplexity": "retain_perplexity",
    "truth_ratio": "forget_truth_ratio",
    "forget_quality": "forget_quality",
    "model_utility": "model_utility",
    "forget_rouge": "forget_Q_A_ROUGE",
    "retain_rouge": "retain_Q_A_ROUGE",
    "retain_truth_ratio": "retain_Truth_Ratio",
    "real_authors_probability": "ra_Q_A_Prob_normalised",
    "real_authors_rouge": "ra_Q_A_ROUGE",
    "real_authors_truth_ratio": "ra_Truth_Ratio",
    "world_facts_probability": "wf_Q_A_Prob_normalised",
    "world_facts_rouge": "wf_Q_A_ROUGE",
    "world_facts_truth_ratio": "wf_Truth_Ratio",
    "extraction_strength": "extraction_strength",
    "exact_memorization": "exact_memorization",
    "mia_loss": "mia_loss",
    "mia_zlib": "mia_zlib",
    "mia_min_k": "mia_min_k",
    "mia_min_k_plus_plus": "mia_min_k_plus_plus",
    "privleak": "privleak",
    "wikitext_perplexity": "wikitext_perplexity",
    "forget_fluency": "forget_fluency",
    "kl_to_full": "kl_to_full",
    "forget_loops": "forget_loops",
    "forget_broken_words": "forget_broken_words",
    "retain_loops": "retain_loops",
    "retain_broken_words": "retain_broken_words",
}
"""Measure of a row -> the metric's name in OpenUnlearning's files (or ours)."""


def row_of(logs: Mapping[str, Entry]) -> dict[str, Any]:
    """Each metric's aggregate under the row's name for it, and the forget set's truth ratios."""
    row: dict[str, Any] = {
        measure: float(logs[metric]["agg_value"])
        for measure, metric in MEASURES.items()
        if metric in logs and logs[metric]["agg_value"] is not None
    }
    ratios = logs["forget_truth_ratio"]["value_by_index"]
    row["truth_ratios"] = [float(entry["score"]) for entry in ratios.values()]
    return row


def median_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each number that every seed has; the first seed's value of all else."""
    first, *others = rows
    return {
        key: _median([row[key] for row in rows])
        if _number(value) and all(_number(row.get(key)) for row in others)
        else value
        for key, value in first.items()
    }


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _median(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else float(statistics.median(values))
