"""A figure that reads in light and dark: SVG in the page's own colours, PNG on white."""

from __future__ import annotations

import io
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito's colour-blind safe palette, those of it that hold on white and on near-black. Shape
# tells series apart as well, and text is never in a series' colour.
VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
GREY = "#8A8A8A"

# Drawn in one odd colour, then replaced: axes and text take the colour of the page's text.
INK = "#010203"

PNG_DPI = 160


@dataclass(frozen=True)
class Picture:
    """A plot and what it shows.

    Attributes:
        name: stem of its file.
        title: a few words.
        caption: how to read it.
        figure: the plot.
        wide: it takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    wide: bool = False

    def svg(self) -> str:
        """An <svg> element; lines and text in ink have the colour of the text around it."""
        buffer = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"libortho-{self.name}"}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :].replace(INK, "currentColor")

    def png(self) -> bytes:
        """The same on white."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white")
        return buffer.getvalue()


def canvas(x: str, y: str, width: float = 5.4, height: float = 3.6) -> tuple[Figure, Axes]:
    """An empty figure of a size in inches, its axes labelled."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(width, height), layout=layout)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=10)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=INK, fontsize=10.5)
    axes.set_ylabel(y, color=INK, fontsize=10.5)
    return figure, axes


def legend(figure: Figure, columns: int) -> None:
    """Every labelled series, below the axes."""
    figure.legend(
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        columnspacing=1.2,
        handlelength=1.6,
        handletextpad=0.5,
    )
