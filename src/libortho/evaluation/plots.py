"""The pictures of a report, as SVG that follows the page's colours (light or dark)."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's colour-blind safe palette; these three hold on white and on near-black.
FORGET, RETAIN, REFERENCE, FULL = "#D55E00", "#0072B2", "#009E73", "#8A8A8A"

# Drawn in one odd colour, then replaced: axes and text take the colour of the page's text.
_INK = "#010203"


def _figure(width: float = 5.4, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="y", color=_INK, alpha=0.12)
    return figure, axes


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "libortho"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def alpha_sweep(rows: dict[str, Any]) -> str:
    """Answer probability of forget and retain authors against alpha, beside full and reference."""
    figure, axes = _figure()
    points = sorted(
        (float(name.removeprefix("alpha ")), row)
        for name, row in rows.items()
        if name.startswith("alpha ")
    )
    alphas = [alpha for alpha, _ in points]
    for part, colour, marker in (("forget", FORGET, "o"), ("retain", RETAIN, "s")):
        values = [row[f"{part}_probability"] for _, row in points]
        axes.plot(alphas, values, color=colour, marker=marker, label=f"{part} authors", lw=2)
    if "reference" in rows:
        level = rows["reference"]["forget_probability"]
        axes.axhline(level, color=REFERENCE, ls="--", lw=1.5, label="never saw them")
    axes.set_ylim(0, 1.02)
    _labels(axes, "alpha", "answer probability")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="center right")
    return _svg(figure)


def forgetting_against_utility(rows: dict[str, Any]) -> str:
    """Every model by what it still knows of the forget set and what it is still good for.

    Utility is TOFU's model utility where it was measured, else the retain probability. A split is a
    path from alpha 1 to alpha 0; where the reference stands is where a method should end.
    """
    measure = "model_utility" if "model_utility" in rows["full"] else "retain_probability"
    figure, axes = _figure(5.4, 3.6)
    paths: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for name, row in rows.items():
        method, _, alpha = name.rpartition("alpha ")
        if alpha != name:
            paths.setdefault(method.rstrip(", "), []).append((float(alpha), row))
    for colour, (method, points) in zip((FORGET, RETAIN, FULL), paths.items(), strict=False):
        path = [row for _, row in sorted(points, key=lambda p: p[0])]
        x, y = [r[measure] for r in path], [r["forget_probability"] for r in path]
        axes.plot(x, y, color=colour, lw=1.5, marker="o", ms=4, label=method or "split, by alpha")
        _tag(axes, "alpha 0", x[0], y[0], colour)
    for name, row in rows.items():
        if "alpha " in name:
            continue
        at = (row[measure], row["forget_probability"])
        colour, marker = {"full": (FULL, "s"), "reference": (REFERENCE, "D")}.get(name, (_INK, "x"))
        axes.plot(*at, color=colour, marker=marker, ms=7, ls="none")
        _tag(axes, {"reference": "never saw them"}.get(name, name), *at, colour)
    if "reference" in rows:
        axes.axhline(rows["reference"]["forget_probability"], color=REFERENCE, ls="--", lw=1)
    axes.set_ylim(-0.03, 1.05)
    axes.margins(x=0.2)
    _labels(axes, measure.replace("_", " "), "forget answer probability")
    if len(paths) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure)


def _tag(axes: Axes, text: str, x: float, y: float, colour: str) -> None:
    axes.annotate(
        text, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8.5, color=colour
    )


def truth_ratio_curves(rows: dict[str, Any]) -> str:
    """Cumulative distribution of the forget set's truth ratios."""
    figure, axes = _figure()
    styles = {
        "full": ("full model", FULL, ":"),
        "alpha 0": ("alpha 0", FORGET, "-"),
        "reference": ("never saw them", REFERENCE, "--"),
    }
    for name, (label, colour, style) in styles.items():
        if name in rows:
            values = sorted(rows[name]["truth_ratios"])
            share = [(i + 1) / len(values) for i in range(len(values))]
            axes.step(values, share, color=colour, ls=style, lw=2, label=label, where="post")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.02)
    _labels(axes, "truth ratio (1: no idea, 0: knows)", "share of questions")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure)


def ortho_per_layer(layers: list[dict[str, Any]]) -> str:
    """Where the memory sits: each layer's share of the ortho numbers."""
    figure, axes = _figure(11, 2.4)
    total = sum(layer["ortho_numel"] for layer in layers) or 1
    shares = [100 * layer["ortho_numel"] / total for layer in layers]
    axes.bar(range(len(layers)), shares, color=FORGET)
    step = max(1, len(layers) // 15)
    axes.set_xticks(range(0, len(layers), step))
    axes.set_xlim(-0.7, len(layers) - 0.3)
    _labels(axes, "split layer, in the model's order", "% of the ortho stream")
    return _svg(figure)
