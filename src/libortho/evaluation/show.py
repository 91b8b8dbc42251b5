"""Results as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The main job's table, its checks, and one question answered by all."""
    table = Table(title=summary["task"]["source"], title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in ("forget prob.", "retain prob.", "forget ppl", "retain ppl", "truth ratio", "KS p"):
        table.add_column(name, justify="right")
    for name, row in summary["rows"].items():
        quality = row.get("forget_quality")
        table.add_row(
            name,
            f"{row['forget_probability']:.3f}",
            f"{row['retain_probability']:.3f}",
            f"{row['forget_perplexity']:.4g}",
            f"{row['retain_perplexity']:.4g}",
            f"{row['truth_ratio']:.3f}",
            "" if quality is None else f"{quality:.3g}",
            style="bold" if name in ("alpha 0", "alpha 1") else "",
        )
    console.print(table)
    for check in summary["bars"]:
        mark = "[green]holds[/]      " if check["holds"] else "[bold red]falls short[/]"
        console.print(
            f"{mark}  {check['bar']}: {check['value']:.4f} ({check['required']})", soft_wrap=True
        )
    for warning in summary["separation"]["warnings"]:
        console.print(f"[bold red]warning[/]  {warning}")
    if summary["examples"]:
        example = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for who, text in summary["examples"][0].items():
            example.add_row(f"[dim]{who}[/]", text)
        console.print()
        console.print(example)


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """`libortho eval`: a row an alpha."""
    table = Table(title=f"{result['text']}: {result['tokens']} tokens", title_justify="left")
    for name in ("alpha", "perplexity", "probability per token"):
        table.add_column(name, justify="right")
    for alpha, value in result["perplexity"].items():
        table.add_row(alpha, f"{value:.4g}", f"{result['probability'][alpha]:.4f}")
    console.print(table)
