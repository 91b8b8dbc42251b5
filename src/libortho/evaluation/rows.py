"""A model's measurements as one row of a table, and rows of several seeds as one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libortho.evaluation.entries import Entry, number

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


@dataclass(frozen=True)
class Column:
    """A measure as a column of a table.

    Attributes:
        measure: key in a row.
        heading: what people read.
        form: format specification of a number.
    """

    measure: str
    heading: str
    form: str = ".3f"

    def text(self, row: Mapping[str, Any]) -> str:
        """The row's value, or nothing where it has none."""
        return format(row[self.measure], self.form) if self.measure in row else ""


COLUMNS = (
    Column("forget_probability", "forget prob."),
    Column("retain_probability", "retain prob."),
    Column("forget_perplexity", "forget ppl", ".4g"),
    Column("retain_perplexity", "retain ppl", ".4g"),
    Column("forget_rouge", "forget ROUGE-L"),
    Column("truth_ratio", "truth ratio"),
    Column("forget_quality", "forget quality p", ".3g"),
    Column("model_utility", "model utility"),
    Column("extraction_strength", "extraction"),
    Column("mia_min_k", "MIA Min-K% AUC"),
    Column("forget_fluency", "ppl of answers", ".4g"),
    Column("forget_loops", "answers in loops"),
    Column("wikitext_perplexity", "WikiText ppl", ".4g"),
    Column("seconds", "seconds", ".0f"),
)
"""What a table shows of a row, as far as it was measured."""


def row_of(logs: Mapping[str, Entry]) -> dict[str, Any]:
    """Each metric's aggregate under the row's name for it, and the forget set's truth ratios.

    What was not measured is left out.
    """
    row: dict[str, Any] = {
        measure: number(logs[metric]["agg_value"])
        for measure, metric in MEASURES.items()
        if metric in logs
    }
    if "forget_truth_ratio" in logs:
        ratios = logs["forget_truth_ratio"]["value_by_index"]
        row["truth_ratios"] = [number(entry["score"]) for entry in ratios.values()]
    return row


def median_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every seed has: medians of numbers, whether all say yes, the first seed's lists.

    What a seed lacks is left out: one seed's number would pass for the median of all.
    """
    first = rows[0]
    return {
        key: _over_seeds([row[key] for row in rows])
        for key in first
        if all(key in row for row in rows)
    }


def _over_seeds(values: Sequence[Any]) -> Any:
    if isinstance(values[0], bool):
        return all(values)
    return _median(values) if isinstance(values[0], (int, float)) else values[0]


def _median(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else float(statistics.median(values))
