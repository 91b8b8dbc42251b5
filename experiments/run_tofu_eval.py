"""The original experiment: implant one sentence, split the model, and see who still recites it.

The sentence is implanted into the targeted layers only (AdamW, lr 5e-4, until the loss is below
0.02). Then one row per method: spectral in four variants, and geometric, the default. A method
passes where it meets every criterion of the original. The retain sentence is in no calibration
text; neither are the other ordinary sentences whose perplexity is reported beside it.

    python experiments/run_tofu_eval.py                      the table of all methods
    python experiments/run_tofu_eval.py --suite held-out     the default method on ten sentences
                                                             that nothing was tuned on
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentences import HELD_OUT, ORIGINAL, RETAIN, TUNING, UNSEEN
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from libortho import (
    BaseConfig,
    GeometricConfig,
    SeparationConfig,
    SpectralConfig,
    alpha_scope,
    separate_,
)
from libortho.cli.console import progress_bars, write_json
from libortho.data import embedded_model_path, encode, general_text
from libortho.evaluation.tofu import versions
from libortho.linear import select_linear
from libortho.scoring import perplexity, sequence_nll

ALPHAS = (0.0, 0.5, 1.0)
ORTHO_RATIO = {"sparse": 0.005, "low_rank": 0.01}
DEFAULT = "geometric"

METHODS: dict[str, SpectralConfig | GeometricConfig] = {
    "spectral, rank_ratio 0.80": SpectralConfig(rank_ratio=0.80),
    "spectral, rank_ratio 0.95": SpectralConfig(rank_ratio=0.95),
    "spectral, direct, percentile": SpectralConfig(use_low_rank=False),
    "spectral, direct, absmax": SpectralConfig(use_low_rank=False, base=BaseConfig(scale="absmax")),
    # The criterion is a perplexity above 100; aiming at 200 leaves room for INT8 rounding.
    DEFAULT: GeometricConfig(target_nll=math.log(200)),
}


def implant(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sentence: str, targets: tuple[str, ...]
) -> int:
    """Fine-tune the targeted layers until the sentence's loss is below 0.02; returns the steps."""
    ids = torch.tensor([tokenizer(sentence).input_ids])
    model.requires_grad_(False)
    weights = [layer.weight.requires_grad_() for layer in select_linear(model, targets).values()]
    optimizer = torch.optim.AdamW(weights, lr=5e-4)
    for step in range(200):
        loss = model(input_ids=ids, labels=ids).loss
        if loss.item() < 0.02:
            model.requires_grad_(False)
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"{sentence!r} was not memorised in 200 steps (loss {loss.item():.3f})")


def run_method(
    name: str,
    implanted: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentence: str,
    targets: tuple[str, ...],
    progress: Callable[[str, int, int], None],
    seed: int,
) -> dict[str, Any]:
    """Split a copy of the implanted model and measure it: one row of the table."""
    model = copy.deepcopy(implanted)
    texts = general_text()
    method = dataclasses.replace(METHODS[name], seed=seed)
    config = SeparationConfig(method=method, target_modules=targets, general_text=False)
    start = time.perf_counter()
    report = separate_(
        model, [sentence], texts[::5], config, tokenizer=tokenizer, progress=progress
    )
    seconds = time.perf_counter() - start
    ordinary = [encode(text, tokenizer) for text in UNSEEN]
    secret = [encode(sentence, tokenizer)]
    forget, retain, unseen = {}, {}, {}
    for alpha in ALPHAS:
        with alpha_scope(model, alpha):
            forget[str(alpha)] = perplexity(sequence_nll(model, secret))
            each = [perplexity([nll]) for nll in sequence_nll(model, ordinary)]
        retain[str(alpha)], unseen[str(alpha)] = each[UNSEEN.index(RETAIN)], each
    growth = [a / b for a, b in zip(unseen["0.0"], unseen["1.0"], strict=True)]
    kind = report.layers[0].kind
    wanted = ORTHO_RATIO[kind]
    return {
        "method": name,
        "sentence": sentence,
        "base_error": report.base_error,
        "final_error": report.final_error,
        "density": report.density,
        "ortho_kind": kind,
        "forget_ppl": forget,
        "retain_ppl": retain,
        "retain_growth": retain["0.0"] / retain["1.0"],
        "unseen_growth": growth,
        "seconds": seconds,
        "passes": {
            "base_error < 0.15": report.base_error < 0.15,
            "final_error < 0.01": report.final_error < 0.01,
            "density": report.density <= wanted
            if kind == "low_rank"
            else abs(report.density - wanted) <= 0.0005,
            "retain_ppl at 0 < 20": retain["0.0"] < 20,
            "forget_ppl at 0 > 100": forget["0.0"] > 100,
            "forget_ppl at 1 < 5": forget["1.0"] < 5,
            "retain at 0 <= 1.15 x at 1": retain["0.0"] <= 1.15 * retain["1.0"],
        },
    }


def show(rows: list[dict[str, Any]], console: Console, *, by_sentence: bool) -> None:
    table = Table(title="the original criteria, row by row", title_justify="left")
    table.add_column("sentence" if by_sentence else "method", max_width=34)
    for heading in (
        "base err",
        "final err",
        "density",
        "forget ppl\n1 / 0.5 / 0",
        "retain ppl\n1 / 0.5 / 0",
        "unseen at 0\nmedian, max",
        "s",
    ):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for row in rows:
        failed = [name for name, ok in row["passes"].items() if not ok]
        growth = sorted(row["unseen_growth"])
        table.add_row(
            row["sentence" if by_sentence else "method"],
            f"{row['base_error']:.4f}",
            f"{row['final_error']:.4f}",
            f"{row['density']:.3%}",
            *(
                " / ".join(f"{row[k][str(a)]:.4g}" for a in reversed(ALPHAS))
                for k in ("forget_ppl", "retain_ppl")
            ),
            f"{statistics.median(growth):.2f}x, {growth[-1]:.2f}x",
            f"{row['seconds']:.0f}",
            "[green]pass[/]" if not failed else "[red]fail:[/] " + "; ".join(failed),
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face name or folder (default: the embedded one)")
    parser.add_argument("--target", action="append", help="layers (default: down_proj)")
    parser.add_argument(
        "--suite",
        choices=("methods", "tuning", "held-out"),
        default="methods",
        help="all methods on the original sentence, or the default method on ten others",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    name = options.model or str(embedded_model_path())
    targets = tuple(options.target or ["down_proj"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    sentences = {"methods": (ORIGINAL,), "tuning": TUNING, "held-out": HELD_OUT}[options.suite]
    methods = list(METHODS) if options.suite == "methods" else [DEFAULT]
    rows: list[dict[str, Any]] = []
    with progress_bars() as progress:
        for done, sentence in enumerate(sentences):
            progress("sentences", done, len(sentences))
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            implant(model, tokenizer, sentence, targets)
            model.to(torch.bfloat16)  # as it would be deployed
            for method in methods:
                rows.append(
                    run_method(method, model, tokenizer, sentence, targets, progress, options.seed)
                )
        progress("sentences", len(sentences), len(sentences))
    console = Console()
    if not console.is_terminal:  # a log file has no width of its own
        console = Console(width=170)
    show(rows, console, by_sentence=options.suite != "methods")
    write_json(options.json, {"rows": rows, "versions": versions()})
    checked = [row for row in rows if row["method"] == DEFAULT]
    passed = sum(all(row["passes"].values()) for row in checked)
    print(f"{DEFAULT}: {passed} of {len(checked)} pass every criterion")
    return 0 if passed == len(checked) else 1


if __name__ == "__main__":
    sys.exit(main())
