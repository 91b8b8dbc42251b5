"""What a good result is, in numbers: the bars that a job's table is held against.

Every function takes rows: {name: {measure: value}}, as `evaluation.rows` makes them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, Any]

AUCS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")

RESTORED = (
    "forget_probability",
    "retain_probability",
    "forget_rouge",
    "retain_rouge",
    "truth_ratio",
    "model_utility",
    "extraction_strength",
    "exact_memorization",
    *AUCS,
)
"""Measures between 0 and 1 which alpha = 1 must bring back to the full model's."""


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


def demo_bars(rows: Mapping[str, Row], density: float | None) -> list[Bar]:
    """The bars of the short job: probabilities alone."""
    full, base, whole = rows["full"], rows.get("alpha 0"), rows.get("alpha 1")
    # A model that never knew them has nothing to forget, and every bar below would be idle.
    found = [at_least("full model: forget probability", full["forget_probability"], 0.9)]
    if base and "reference" in rows:
        gap = abs(base["forget_probability"] - rows["reference"]["forget_probability"])
        found.append(at_most("alpha 0: forget probability, distance to the reference", gap, 0.05))
    if base:
        kept = base["retain_probability"] / full["retain_probability"]
        found.append(at_least("alpha 0: retain probability / full model's", kept, 0.95))
    if whole:
        for part in ("forget", "retain"):
            gap = abs(whole[f"{part}_probability"] - full[f"{part}_probability"])
            found.append(
                at_most(f"alpha 1: {part} probability, distance to the full model", gap, 0.01)
            )
    return found + _density(density)


def benchmark_bars(
    rows: Mapping[str, Row], density: float | None, baselines: Sequence[str]
) -> list[Bar]:
    """The bars of the whole benchmark, for the main method.

    What was not measured has the value NaN, and its bar does not hold.

    Args:
        rows: with "full", "reference", "alpha 0" and "alpha 1".
        density: ortho parameters over the targeted layers'; None for a sparse ortho that is not
            held to the bar.
        baselines: names of the rows that are to be beaten.
    """
    full, reference, base, whole = (
        defaultdict(lambda: math.nan, rows[name])
        for name in ("full", "reference", "alpha 0", "alpha 1")
    )

    def apart(measure: str) -> float:
        return abs(base[measure] - reference[measure])

    found = [
        at_least("full model: forget probability", full["forget_probability"], 0.9),
        at_least("forget quality: p of the KS test", base["forget_quality"], 0.05),
        at_most("forget probability, distance to the reference", apart("forget_probability"), 0.03),
        at_most("forget ROUGE-L, distance to the reference", apart("forget_rouge"), 0.05),
        at_least(
            "model utility / full model's", base["model_utility"] / full["model_utility"], 0.97
        ),
        at_least(
            "retain probability / full model's",
            base["retain_probability"] / full["retain_probability"],
            0.97,
        ),
        at_most(
            "extraction strength, distance to the reference", apart("extraction_strength"), 0.05
        ),
    ]
    known = [auc for auc in AUCS if auc in base and auc in reference]
    if known:
        worst = max(known, key=apart)
        found.append(
            at_most(
                f"membership AUC, distance to the reference (worst: {worst})", apart(worst), 0.05
            )
        )
    found += [
        at_most(
            "perplexity of its answers under the pretrained model / the reference's",
            base["forget_fluency"] / reference["forget_fluency"],
            1.3,
        ),
        at_most(
            "alpha 1: largest distance of a measure to the full model's",
            max(abs(whole[m] - full[m]) for m in RESTORED if m in whole),
            0.01,
        ),
        at_most("alpha 1: mean token KL to the full model, nats", whole["kl_to_full"], 1e-3),
        *_density(density),
    ]
    others = [rows[name] for name in baselines if name in rows]
    if others:
        fastest = min((r["seconds"] for r in others if r["stopped"]), default=math.nan)
        found.append(
            at_least(
                "seconds of the fastest gradient baseline at equal forgetting / of the split",
                fastest / max(base["seconds"], 1e-9),
                10,
            )
        )
        beaten = sum(
            base["forget_quality"] > r["forget_quality"]
            and base["model_utility"] > r.get("model_utility", math.nan)
            for r in others
        )
        found.append(
            at_least(
                "share of baselines beaten on forget quality and model utility at once",
                beaten / len(others),
                1,
            )
        )
    return found


def _density(density: float | None) -> list[Bar]:
    if density is None or math.isnan(density):
        return []
    return [at_most("ortho parameters / targeted layers'", density, 0.01)]
