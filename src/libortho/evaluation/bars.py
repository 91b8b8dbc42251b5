"""What a good result is, in numbers: the bars that a job's table is held against.

Every function takes rows: {name: {measure: value}}, as `evaluation.rows` makes them. What was not
measured has the value NaN, and its bar does not hold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, Any]

AUCS = {
    "mia_loss": "loss",
    "mia_zlib": "zlib",
    "mia_min_k": "Min-K%",
    "mia_min_k_plus_plus": "Min-K%++",
}
"""Membership attacks, by measure."""

SHARES = (
    *(f"{part}_probability" for part in ("forget", "retain", "real_authors", "world_facts")),
    *(f"{part}_rouge" for part in ("forget", "retain", "real_authors", "world_facts")),
    *("truth_ratio", "retain_truth_ratio", "real_authors_truth_ratio", "world_facts_truth_ratio"),
    *("model_utility", "extraction_strength", "exact_memorization"),
    *AUCS,
    *(f"{part}_{fault}" for part in ("forget", "retain") for fault in ("loops", "broken_words")),
)
"""Measures between 0 and 1 which alpha = 1 must bring back to the full model's."""

PERPLEXITIES = ("forget_perplexity", "retain_perplexity", "wikitext_perplexity", "forget_fluency")
"""Measures that have no scale of their own: alpha = 1 must bring them back relatively."""

QUALITY = "forget quality: p of the KS test"
"""The bar that every seed must keep, not only the median."""


@dataclass(frozen=True)
class Limits:
    """What is required of forgetting and utility at alpha = 0.

    Attributes:
        forget_gap: largest distance of the forget probability to the reference's.
        kept: least share of the full model's utility, and of its retain probability.
        forget_quality: least p of the KS test.
    """

    forget_gap: float
    kept: float
    forget_quality: float = 0.05


def limits(*, quick: bool) -> Limits:
    """The limits of the short job, or those of the whole benchmark."""
    return Limits(0.05, 0.95) if quick else Limits(0.03, 0.97)


@dataclass(frozen=True)
class Bar:
    """One requirement and what was measured.

    Attributes:
        bar: what is required, in words.
        value: measured.
        required: the limit with its sign, such as "<= 0.05".
        holds: whether the value keeps it.
    """

    bar: str
    value: float
    required: str
    holds: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def at_most(bar: str, value: float, limit: float) -> Bar:
    return Bar(bar, value, f"<= {limit:g}", value <= limit)


def at_least(bar: str, value: float, limit: float) -> Bar:
    return Bar(bar, value, f">= {limit:g}", value >= limit)


def over_seeds(each: Sequence[Sequence[Bar]]) -> list[Bar]:
    """The bars of several seeds as one list: medians, and the worst where every seed counts."""
    if len(each) == 1:
        return list(each[0])
    found = []
    for same in zip(*each, strict=True):
        first, values = same[0], [bar.value for bar in same]
        sign, limit = first.required.split()
        every = first.bar == QUALITY
        name = f"{first.bar}, worst of {len(each)} seeds" if every else first.bar
        if any(math.isnan(value) for value in values):
            value = math.nan
        elif every:
            value = min(values) if sign == ">=" else max(values)
        else:
            value = statistics.median(values)
        found.append((at_least if sign == ">=" else at_most)(name, value, float(limit)))
    return found


def demo_bars(rows: Mapping[str, Row], density: float) -> list[Bar]:
    """The bars of the short job: probabilities alone. The list is the same for every such job.

    Args:
        rows: with "full", "alpha 0" and "alpha 1", and "reference" where there is one.
        density: ortho parameters over the targeted layers'.
    """
    full, base, whole = (rows[name] for name in ("full", "alpha 0", "alpha 1"))
    bounds = limits(quick=True)
    return [
        # A model that never knew them has nothing to forget, and every bar below would be idle.
        at_least("full model: forget probability", _value(full, "forget_probability"), 0.9),
        at_most(
            "alpha 0: forget probability, distance to the reference",
            _gap(base, rows.get("reference", {}), "forget_probability"),
            bounds.forget_gap,
        ),
        at_least(
            "alpha 0: retain probability / full model's",
            _ratio(_value(base, "retain_probability"), _value(full, "retain_probability")),
            bounds.kept,
        ),
        *(
            at_most(
                f"alpha 1: {part} probability, distance to the full model",
                _gap(whole, full, f"{part}_probability"),
                0.01,
            )
            for part in ("forget", "retain")
        ),
        _density(density),
    ]


def benchmark_bars(rows: Mapping[str, Row], density: float, baselines: Sequence[str]) -> list[Bar]:
    """The bars of the whole benchmark, for the main method; the same list for every such job.

    Args:
        rows: with "full", "alpha 0" and "alpha 1", and "reference" where there is one.
        density: ortho parameters over the targeted layers'.
        baselines: names of the rows that are to be beaten.
    """
    full, base, whole = (rows[name] for name in ("full", "alpha 0", "alpha 1"))
    bounds = limits(quick=False)
    reference = rows.get("reference", {})
    others = [rows[name] for name in baselines if name in rows]

    def apart(what: str, measure: str, limit: float) -> Bar:
        return at_most(f"{what}, distance to the reference", _gap(base, reference, measure), limit)

    def kept(what: str, measure: str) -> Bar:
        share = _ratio(_value(base, measure), _value(full, measure))
        return at_least(f"{what} / full model's", share, bounds.kept)

    return [
        at_least("full model: forget probability", _value(full, "forget_probability"), 0.9),
        at_least(QUALITY, _value(base, "forget_quality"), bounds.forget_quality),
        apart("forget probability", "forget_probability", bounds.forget_gap),
        apart("forget ROUGE-L", "forget_rouge", 0.05),
        kept("model utility", "model_utility"),
        kept("retain probability", "retain_probability"),
        apart("extraction strength", "extraction_strength", 0.05),
        *(apart(f"membership AUC, {attack}", auc, 0.05) for auc, attack in AUCS.items()),
        at_most(
            "perplexity of its answers under the pretrained model / the reference's",
            _ratio(_value(base, "forget_fluency"), _value(reference, "forget_fluency")),
            1.3,
        ),
        at_most(
            "alpha 1: largest distance of a measure to the full model's (perplexities: relative)",
            _restoration(full, whole),
            0.01,
        ),
        at_most(
            "alpha 1: mean token KL to the full model, nats", _value(whole, "kl_to_full"), 1e-3
        ),
        _density(density),
        at_least(
            "seconds of the fastest gradient baseline at equal forgetting / of the split",
            _ratio(
                min((row["seconds"] for row in others if row["stopped"]), default=math.nan),
                _value(base, "seconds"),
            ),
            10,
        ),
        at_least(
            "share of baselines beaten on forget quality and model utility at once",
            _beaten(base, others),
            1,
        ),
    ]


def _value(row: Row, measure: str) -> float:
    return float(row.get(measure, math.nan))


def _gap(row: Row, other: Row, measure: str) -> float:
    return abs(_value(row, measure) - _value(other, measure))


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole else math.nan


def _restoration(full: Row, whole: Row) -> float:
    """The largest distance of what was measured of the full model."""
    gaps = [abs(_value(whole, m) - full[m]) for m in SHARES if m in full]
    gaps += [abs(_ratio(_value(whole, m), full[m]) - 1) for m in PERPLEXITIES if m in full]
    return math.nan if not gaps or any(map(math.isnan, gaps)) else max(gaps)


def _beaten(base: Row, others: Sequence[Row]) -> float:
    """The share of rows that are below `base` in both; a row without a measure is not beaten."""
    if not others:
        return math.nan
    measures = ("forget_quality", "model_utility")
    beaten = [all(_value(base, m) > _value(row, m) for m in measures) for row in others]
    return sum(beaten) / len(others)


def _density(density: float) -> Bar:
    return at_most("ortho parameters / targeted layers'", density, 0.01)
