"""Pictures with one place for each layer: where the memory sat, and how cleanly it was cut out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from libortho.evaluation.canvas import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Picture,
    canvas,
    legend,
)

Layers = Sequence[Mapping[str, Any]]

_KINDS = ((VERMILION, "o"), (BLUE, "s"), (ORANGE, "^"), (PURPLE, "D"), (SKY, "v"), (GREEN, "P"))
_LARGEST = 160.0
"""Area of the dot of the direction with the most forget energy, in points squared."""


def forget_energy(
    layers: Layers, spectrum: Mapping[str, Mapping[str, Sequence[float]]]
) -> Picture | None:
    """The spectrum: each direction's forget energy over its retain energy, layer by layer."""
    most = max((value for of in spectrum.values() for value in of["forget"]), default=0.0)
    if most <= 0:
        return None
    places = _places(layers)
    figure, axes = _by_layer("forget energy / retain energy", places, 3.4)
    for name, of in spectrum.items():
        x, _, (colour, marker) = places[name]
        kept = [(f, r) for f, r in zip(of["forget"], of["retain"], strict=True) if f > 0 and r > 0]
        axes.scatter(
            [x] * len(kept),
            [forget / retain for forget, retain in kept],
            s=[max(10.0, _LARGEST * forget / most) for forget, _ in kept],
            color=colour,
            marker=marker,
            alpha=0.75,
            linewidths=0,
        )
    axes.set_yscale("log")
    axes.axhline(1, color=INK, lw=1, alpha=0.6)
    _kinds(figure, axes, places)
    return Picture(
        "forget_energy",
        "Spectrum of forget energy",
        "Each dot is one direction of the ortho stream: how many times more it changes the layer's "
        "output where the forget set is predicted than on retain data (mean squares, in the retain "
        "metric; on the line, both alike). The larger the dot, the more of the forgetting it does. "
        "Large and high is a clean cut.",
        figure,
        wide=True,
    )


def ortho_per_layer(layers: Layers) -> Picture:
    """Where the memory sits: each layer's share of the ortho numbers."""
    places = _places(layers)
    figure, axes = _by_layer("% of the ortho stream", places, 2.6)
    total = sum(layer["ortho_numel"] for layer in layers) or 1
    heights: dict[float, float] = {}
    for layer in layers:
        x, _, (colour, _) = places[layer["name"]]
        share = 100 * layer["ortho_numel"] / total
        axes.bar(x, share, bottom=heights.get(x, 0.0), color=colour, width=0.75)
        heights[x] = heights.get(x, 0.0) + share
    _kinds(figure, axes, places)
    return Picture(
        "ortho_per_layer",
        "Where the ortho stream is",
        "Each layer's share of the ortho stream's numbers.",
        figure,
        wide=True,
    )


_Place = tuple[float, str, tuple[str, str]]


def _places(layers: Layers) -> dict[str, _Place]:
    """Each layer's place on the axis (its block, where its name has one), kind and style."""
    names = [layer["name"] for layer in layers]
    blocks = [re.search(r"\.(\d+)\.", name) for name in names]
    if all(blocks):
        numbers = [float(block[1]) for block in blocks if block]
        kinds = [name[block.end() :] for name, block in zip(names, blocks, strict=True) if block]
    else:
        numbers = [float(position) for position in range(len(names))]
        kinds = [name.rpartition(".")[2] for name in names]
    styles = {kind: _KINDS[i % len(_KINDS)] for i, kind in enumerate(dict.fromkeys(kinds))}
    return {
        name: (number, kind, styles[kind])
        for name, number, kind in zip(names, numbers, kinds, strict=True)
    }


def _by_layer(y: str, places: Mapping[str, _Place], height: float) -> tuple[Figure, Axes]:
    figure, axes = canvas("layer, from input to output", y, 11, height)
    last = max(x for x, _, _ in places.values())
    axes.set_xlim(-0.8, last + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(min(16, int(last) + 1), integer=True))
    return figure, axes


def _kinds(figure: Figure, axes: Axes, places: Mapping[str, _Place]) -> None:
    """A legend, where layers of several kinds were split."""
    styles = {kind: style for _, kind, style in places.values()}
    if len(styles) == 1:
        return
    for kind, (colour, marker) in styles.items():
        axes.add_line(Line2D([], [], color=colour, marker=marker, ls="none", label=kind))
    legend(figure, len(styles))
