"""How much does the truncated SVD cost, beside torch.linalg.svd at equal error?

    python benchmarks/svd.py [--json FILE]

One matrix of 5632 x 2048 with a decaying spectrum, as a linear layer's; medians of a few runs, all
in one process. The bar: at most a third of torch.linalg.svd's time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from libortho.cli.console import write_json
from libortho.evaluation.tofu import versions
from libortho.linalg import low_rank_part, randomized_low_rank_part

SHAPE = (5632, 2048)
BAR = 1 / 3


def full_svd(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def timed(function: Callable[[], Tensor], runs: int) -> tuple[float, Tensor]:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(SHAPE) * torch.linspace(1.5, 0.3, SHAPE[1])
    rows = []
    for rank_ratio in (0.95, 0.8, 0.05):
        rank = int(rank_ratio * min(SHAPE))
        reference, best = timed(lambda r=rank: full_svd(weight, r), options.runs)
        for name, function in (
            ("exact", low_rank_part),
            ("randomized", randomized_low_rank_part),
        ):
            seconds, part = timed(lambda f=function, r=rank: f(weight, r), options.runs)
            rows.append(
                {
                    "svd": name,
                    "rank_ratio": rank_ratio,
                    "seconds": seconds,
                    "linalg_svd_seconds": reference,
                    "ratio": seconds / reference,
                    "error": float((part - weight).norm() / weight.norm()),
                    "linalg_svd_error": float((best - weight).norm() / weight.norm()),
                }
            )
    table = Table(title=f"truncated SVD of {SHAPE[0]} x {SHAPE[1]}", title_justify="left")
    for heading in ("svd", "rank ratio", "s", "linalg.svd s", "ratio", "error", "its error"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [row[k] for k in ("seconds", "linalg_svd_seconds", "ratio")]
        errors = [row[k] for k in ("error", "linalg_svd_error")]
        table.add_row(
            row["svd"],
            f"{row['rank_ratio']:g}",
            *(f"{n:.3f}" for n in numbers),
            *(f"{e:.6f}" for e in errors),
        )
    Console().print(table)
    exact = [row for row in rows if row["svd"] == "exact"]
    holds = all(
        row["ratio"] <= BAR and row["error"] <= row["linalg_svd_error"] * 1.0001 for row in exact
    )
    write_json(options.json, {"rows": rows, "required_ratio": BAR, "holds": holds, **versions()})
    print(f"exact: at most {BAR:.2f} x torch.linalg.svd at equal error: {holds}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
