"""The pictures of a report, drawn from a job's summary alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from libortho.evaluation.bars import Limits, limits
from libortho.evaluation.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Picture,
    canvas,
    legend,
)
from libortho.evaluation.layer_plots import forget_energy, ortho_per_layer

Rows = Mapping[str, Mapping[str, Any]]

REFERENCE = "never saw them"
LEAST_P = 1e-20
"""Smaller p-values are drawn here."""

LEAST_SPAN = 0.2
"""Utility that an axis spans at least: a hundredth more or less should not fill the plot."""

UNMEASURED = " Dotted: between its two ends nothing was measured."

TOP = 6.0
"""End of the axis of p-values: above 1, for a mark there to be whole."""

_SPLITS = ((VERMILION, "o"), (ORANGE, "s"), (PURPLE, "D"), (SKY, "h"), (BLUE, "p"))
_BASELINES = ("^", "X", "P", "v", "*", "d", "<", ">")


def pictures(summary: Mapping[str, Any]) -> list[Picture]:
    """All that the summary has the numbers for."""
    rows, separation = summary["rows"], summary["separation"]
    first = next(iter(summary["seeds"].values()))["rows"] if "seeds" in summary else rows
    main = next(iter(summary["methods"]))
    bounds = limits(quick=summary["suite"]["quick"])
    found = [
        forgetting_against_utility(rows, main, bounds),
        quality_against_utility(rows, main, bounds),
        alpha_sweep(rows),
        truth_ratios(first),
        forget_energy(separation["layers"], separation.get("spectrum", {})),
        ortho_per_layer(separation["layers"]),
    ]
    return [picture for picture in found if picture is not None]


def forgetting_against_utility(rows: Rows, main: str, bounds: Limits) -> Picture:
    """Every model by what it still knows of the forget set and what it is still good for.

    Utility is TOFU's model utility where it was measured, else the retain probability. A split is a
    path from alpha 1 to alpha 0; where the reference stands is where a method should end.
    """
    measure = "model_utility" if "model_utility" in rows["full"] else "retain_probability"
    figure, axes = canvas(measure.replace("_", " "), "forget answer probability", height=4.6)
    dotted = _models(axes, rows, main, measure, "forget_probability")
    caption = "Down is forgotten, right is useful. A split's large mark is alpha 0." + dotted
    if "reference" in rows:
        level = rows["reference"]["forget_probability"]
        axes.axhline(level, color=GREEN, ls="--", lw=1.2, zorder=1)
        low, high = level - bounds.forget_gap, level + bounds.forget_gap
        _goal(axes, rows["full"].get(measure, math.nan) * bounds.kept, low, high)
        caption += (
            " The dashed line is a model that never saw the forget set: below it, too much was "
            "forgotten. In the green field both bars hold."
        )
    axes.set_ylim(-0.03, 1.05)
    legend(figure, 3)
    return Picture("forgetting_against_utility", "Forgetting against utility", caption, figure)


def quality_against_utility(rows: Rows, main: str, bounds: Limits) -> Picture | None:
    """TOFU's own plane: forget quality, the p of the KS test, against model utility."""
    if not {"forget_quality", "model_utility"} <= set(rows["full"]):
        return None
    figure, axes = canvas("model utility", "forget quality, p of the KS test", height=4.6)
    dotted = _models(axes, rows, main, "model_utility", "forget_quality", least=LEAST_P)
    axes.set_yscale("log")
    axes.axhline(bounds.forget_quality, color=GREEN, ls="--", lw=1.2, zorder=1)
    _goal(axes, rows["full"]["model_utility"] * bounds.kept, bounds.forget_quality, TOP)
    axes.set_ylim(top=TOP)
    legend(figure, 3)
    return Picture(
        "quality_against_utility",
        "Forget quality against utility",
        "Up is as if it had never been seen, right is useful. A split's large mark is alpha 0. "
        "Below the dashed line a test tells the model from one that never saw the forget set. In "
        "the green field both bars hold." + dotted,
        figure,
    )


def _models(axes: Axes, rows: Rows, main: str, x: str, y: str, least: float = -math.inf) -> str:
    """Every model as a point, every split as a path over alpha; what was not measured is left out.

    `least`: smaller values of `y` are drawn there. Returns what the caption must say of the paths.
    """
    paths: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    points: dict[str, Mapping[str, Any]] = {}
    for name, row in rows.items():
        method, found, alpha = name.rpartition("alpha ")
        if found:
            paths.setdefault(method.rstrip(", ") or main, []).append((float(alpha), row))
        else:
            points[name] = row

    def at(row: Mapping[str, Any]) -> tuple[float, float]:
        return row.get(x, math.nan), max(row.get(y, math.nan), least)

    for (colour, marker), (method, path) in zip(cycle(_SPLITS), paths.items(), strict=False):
        path = sorted(path, key=lambda step: step[0])
        xs, ys = zip(*(at(row) for _, row in path), strict=True)
        axes.plot(xs, ys, color=colour, ls=_path(xs), lw=1.6, marker=marker, ms=4, zorder=3)
        label = f"{method}, alpha {path[0][0]:g} to {path[-1][0]:g}"
        axes.plot(xs[0], ys[0], color=colour, marker=marker, ms=9, ls="none", label=label, zorder=4)
    shapes = iter(_BASELINES)
    for name, row in points.items():
        colour, marker = {"full": (GREY, "s"), "reference": (GREEN, "D")}.get(name) or (
            BLUE,
            next(shapes, "x"),
        )
        label = {"full": "full model", "reference": REFERENCE}.get(name, name)
        # The reference is a ring: a split that lands on it must not hide it, nor be hidden.
        ring = {"ms": 13, "mfc": "none", "mew": 2} if name == "reference" else {"ms": 7.5}
        axes.plot(*at(row), color=colour, marker=marker, ls="none", label=label, zorder=5, **ring)
    axes.margins(x=0.12)
    left, right = axes.get_xlim()
    left = min(left, right - LEAST_SPAN)
    axes.set_xlim(left, right + 0.03 * (right - left))  # where a mark at the edge is whole
    return UNMEASURED if any(_path(path) == ":" for path in paths.values()) else ""


def _path(steps: Sequence[Any]) -> str:
    """The line between measurements: dotted where there are but the two ends."""
    return ":" if len(steps) == 2 else "-"


def _goal(axes: Axes, left: float, low: float, high: float) -> None:
    """The field where forgetting and utility are both as required."""
    if math.isnan(left):
        return
    right = max(axes.get_xlim()[1], left * 1.05)
    axes.add_patch(
        Rectangle((left, low), right - left, high - low, color=GREEN, alpha=0.22, lw=0, zorder=0)
    )
    axes.set_xlim(right=right)


def alpha_sweep(rows: Rows) -> Picture:
    """Answer probability of forget and retain authors against alpha, beside the reference."""
    figure, axes = canvas("alpha", "answer probability")
    points = sorted(
        (float(name.removeprefix("alpha ")), row)
        for name, row in rows.items()
        if name.startswith("alpha ")
    )
    alphas = [alpha for alpha, _ in points]
    for part, colour, marker in (("retain", BLUE, "s"), ("forget", VERMILION, "o")):
        values = [row[f"{part}_probability"] for _, row in points]
        label = f"{part} authors"
        axes.plot(alphas, values, color=colour, ls=_path(alphas), lw=2, marker=marker, label=label)
    if "reference" in rows:
        level = rows["reference"]["forget_probability"]
        axes.axhline(level, color=GREEN, ls="--", lw=1.5, label=f"forget, {REFERENCE}")
    axes.set_ylim(0, 1.02)
    legend(figure, 3)
    return Picture(
        "alpha_sweep",
        "Turning alpha up",
        "Turning alpha up brings the forgotten authors back; the others never left."
        + (UNMEASURED if _path(alphas) == ":" else ""),
        figure,
    )


def truth_ratios(rows: Rows) -> Picture | None:
    """Cumulative distribution of the forget set's truth ratios, with the p of the KS test."""
    if "truth_ratios" not in rows["full"]:  # questions without perturbed answers have none
        return None
    figure, axes = canvas("truth ratio (1: no idea, 0: knows)", "share of questions")
    styles = {
        "full": ("full model", GREY, ":"),
        "alpha 0": ("alpha 0", VERMILION, "-"),
        "reference": (REFERENCE, GREEN, "--"),
    }
    for name, (label, colour, style) in styles.items():
        if name not in rows:
            continue
        values = sorted(rows[name]["truth_ratios"])
        share = [(i + 1) / len(values) for i in range(len(values))]
        if name != "reference" and "forget_quality" in rows[name]:
            label += f", p = {rows[name]['forget_quality']:.2g}"
        axes.step(values, share, color=colour, ls=style, lw=2, label=label, where="post")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.02)
    legend(figure, 3)
    return Picture(
        "truth_ratios",
        "Truth ratios of the forget questions",
        "Alpha 0 should lie on the dashed line. p is that of the KS test against it: small where "
        "the two can be told apart.",
        figure,
    )
