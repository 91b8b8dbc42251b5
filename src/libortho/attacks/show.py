"""The attacks' results as tables on the terminal, and as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from libortho.attacks.relearning import STEPS
from libortho.attacks.suite import BASE, ORIGINAL, REFERENCE
from libortho.evaluation.canvas import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from libortho.evaluation.entries import number

_STYLE = {BASE: (VERMILION, "o"), REFERENCE: (GREEN, "D"), ORIGINAL: (GREY, "s")}
_OTHERS = ((BLUE, "^"), (PURPLE, "v"), (SKY, "P"), (ORANGE, "X"))


def print_attacks(summary: dict[str, Any], console: Console) -> None:
    """A table an attack, then the bars, then what could not be tried."""
    for attack, result in summary["attacks"].items():
        models = list(result["scores"])
        table = Table(title=attack, title_justify="left")
        table.add_column("what was tried")
        table.add_column("measure", style="dim")
        for who in models:
            table.add_column(escape(who), justify="right")
        for name, measure, row in _rows(result):
            table.add_row(escape(name), measure, *(_text(row.get(who)) for who in models))
        if table.row_count:
            console.print(table)
    for check in summary["bars"]:
        mark = "[green]holds[/]      " if check["holds"] else "[bold red]falls short[/]"
        console.print(
            f"{mark}  {escape(check['bar'])}: {check['value']:.4f} ({check['required']})",
            soft_wrap=True,
            highlight=False,
        )
    if not summary["bars"]:
        console.print(
            "no bars: nothing is judged without --reference, a model that never saw the forget set",
            soft_wrap=True,
            highlight=False,
        )
    for told in _reasons(summary):
        console.print(f"[dim]not tried[/]  {escape(told)}", soft_wrap=True, highlight=False)


def _rows(result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, measure, {model: score}) of every score that any model has, in order."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for who, scores in result["scores"].items():
        for score in scores:
            found.setdefault(score["name"], (score["measure"], {}))[1][who] = score
    return [(name, measure, row) for name, (measure, row) in found.items()]


def _text(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    if score["value"] is None:
        return "not finite"
    if score["measure"] == STEPS:
        reached = score["details"]["reached"]
        return f"{score['value']:.1f}" if reached else f"> {score['value']:.0f}"
    error = score["standard_error"]
    return f"{score['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _reasons(summary: dict[str, Any]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for attack, result in summary["attacks"].items():
        for who, missing in result["missing"].items():
            for name, reason in missing.items():
                reasons.setdefault(f"{attack}, {name}: {reason}", []).append(who)
    return [f"{reason} ({', '.join(who)})" for reason, who in reasons.items()]


def draw_attacks(summary: dict[str, Any], path: Path) -> None:
    """Every rate as a dot per model, and the relearning curves; the suffix says PNG or SVG."""
    rates = [
        (attack, name, row)
        for attack, result in summary["attacks"].items()
        for name, measure, row in _rows(result)
        if measure != STEPS
    ]
    lessons = [
        (name, row)
        for name, measure, row in _rows(summary["attacks"].get("relearning", {"scores": {}}))
        if measure == STEPS
    ]
    height = max(3.0, 1.2 + 0.22 * len(rates))
    figure = Figure(figsize=(8 + 4 * bool(lessons), height), layout="constrained")
    grid = figure.add_gridspec(
        max(1, len(lessons)), 1 + bool(lessons), width_ratios=(2, 1)[: 1 + bool(lessons)]
    )
    models = list(summary["models"])
    if rates:
        _dots(figure.add_subplot(grid[:, 0]), rates, models)
    for place, (name, row) in enumerate(lessons):
        axes = figure.add_subplot(grid[place, 1])
        for who, score in row.items():
            colour, marker = _style(who, models)
            steps, values = zip(*score["details"]["curve"], strict=True)
            axes.plot(steps, values, color=colour, marker=marker, ms=3.5, lw=1.5)
        axes.set_title(f"relearning on {name}", fontsize=8.5, loc="left")
        axes.set_ylim(0, 1.02)
        _clean(axes, "y")
    if lessons:
        axes.set_xlabel("steps; y: answer probability of the rest", fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")


def _dots(axes: Axes, rates: list[tuple[str, str, dict[str, Any]]], models: list[str]) -> None:
    for who in models:
        colour, marker = _style(who, models)
        points = [(row[who], y) for y, (_, _, row) in enumerate(rates) if who in row]
        axes.errorbar(
            [number(score["value"]) for score, _ in points],
            [y for _, y in points],
            xerr=[score["standard_error"] or 0.0 for score, _ in points],
            color=colour, marker=marker, ms=5, ls="none", elinewidth=1, label=who,
        )  # fmt: skip
    for y, (_, _, row) in enumerate(rates):
        chance = next((s["chance"] for s in row.values() if s["chance"] is not None), None)
        if chance is not None:
            axes.plot([chance, chance], [y - 0.35, y + 0.35], color="#000000", lw=1)
    axes.set_yticks(range(len(rates)), [f"{attack}: {name}" for attack, name, _ in rates])
    axes.set_ylim(len(rates) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("recovered (bar: chance, where it is known)", fontsize=8.5)
    axes.legend(frameon=False, fontsize=8.5, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    _clean(axes, "x")


def _style(who: str, models: list[str]) -> tuple[str, str]:
    others = [name for name in models if name not in _STYLE]
    return _STYLE.get(who) or _OTHERS[others.index(who) % len(_OTHERS)]


def _clean(axes: Axes, grid: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, color="#000000", alpha=0.1)
