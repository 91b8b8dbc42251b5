"""Results as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from libortho.evaluation.rows import COLUMNS

TERMINAL_COLUMNS = 8
NOT_ON_TERMINAL = (
    "forget_perplexity",
    "retain_perplexity",
    "extraction_strength",
    "forget_loops",
    "mia_min_k",
)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The main job's table, its checks, and one question answered by all."""
    table = Table(title=escape(summary["task"]["source"]), title_justify="left")
    table.add_column("model", no_wrap=True)
    shown = [c for c in COLUMNS if any(c.measure in row for row in summary["rows"].values())]
    if len(shown) > TERMINAL_COLUMNS:  # the report has them all
        shown = [c for c in shown if c.measure not in NOT_ON_TERMINAL]
    for column in shown:
        table.add_column(column.heading, justify="right")
    for name, row in summary["rows"].items():
        table.add_row(
            name,
            *(column.text(row) for column in shown),
            style="bold" if name in ("alpha 0", "alpha 1") else "",
        )
    console.print(table)
    for check in summary["bars"]:
        mark = "[green]holds[/]      " if check["holds"] else "[bold red]falls short[/]"
        value = "not measured" if math.isnan(check["value"]) else f"{check['value']:.4f}"
        console.print(f"{mark}  {check['bar']}: {value} ({check['required']})", soft_wrap=True)
    for warning in summary["separation"]["warnings"]:
        console.print(f"[bold red]warning[/]  {escape(warning)}")
    if summary["examples"]:
        example = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for who, text in _telling(summary["examples"]).items():
            example.add_row(f"[dim]{who}[/]", escape(text))
        console.print()
        console.print(example)


def _telling(examples: Sequence[dict[str, str]]) -> dict[str, str]:
    """The first that the full model recites, which is what can be forgotten; else the first."""
    recited = (e for e in examples if e.get("full", "").strip() == e["truth"].strip())
    return next(recited, examples[0])


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """`libortho eval`: a row an alpha."""
    title = escape(f"{result['text']}: {result['tokens']} tokens")
    table = Table(title=title, title_justify="left")
    for name in ("alpha", "perplexity", "probability per token"):
        table.add_column(name, justify="right")
    for alpha, value in result["perplexity"].items():
        table.add_row(alpha, f"{value:.4g}", f"{result['probability'][alpha]:.4f}")
    console.print(table)
