"""What does the switch cost? The engine over a split, beside itself over the original model.

    python benchmarks/serving.py SPLIT [--original MODEL] [--json FILE]

The same continuous batching runs the original model, as transformers loads it, and the split: at
alpha 0, at alpha 1, and at mixed alphas. Answers are greedy, of a fixed length and from the same
prompts. A machine that others use changes its speed from one quarter of a minute to the next, by
more than what is asked here. So a turn takes a few seconds, all turns of a round follow each other,
each round begins with another one, and what counts is the ratio to the original *of the same
round*: its median over the rounds, with an interval that holds the true median with 95 %. Two bars,
on those medians: tokens a second at alpha 0 at least 0.95 of the original's, at alpha 1 at least
0.90.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from libortho.cli.console import write_json
from libortho.data.embedded import embedded_model_path
from libortho.data.general import general_text
from libortho.evaluation.tofu import versions
from libortho.serve import rows
from libortho.serve.engine import Generation, Prompt
from libortho.serve.engine_transformers import TransformersEngine
from libortho.serve.limits import Limits
from libortho.serve.loading import Loaded, load_for_serving

BARS = {"alpha 0": 0.95, "alpha 1": 0.90}
ORIGINAL = "original"


class WithoutEnd(TransformersEngine):
    """Never ends an answer early: every round makes the same number of tokens."""

    def __init__(self, loaded: Loaded, limits: Limits) -> None:
        super().__init__(loaded, limits)
        self._ends = frozenset()


@contextmanager
def unsplit(on: bool) -> Iterator[None]:
    """Let the batching code run a model that has no split layers."""
    if not on:
        yield
        return
    with (
        mock.patch.object(rows, "ortho_layers", return_value={}),
        mock.patch.object(rows, "scope_of_rows", side_effect=lambda *_: nullcontext()),
    ):
        yield


def load_original(name: str, dtype: torch.dtype, split: Loaded) -> Loaded:
    """The original, with the tokenizer of its split: a fine-tune may have been kept without one."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval().requires_grad_(False)
    return Loaded(model, split.tokenizer, "", "present")


async def one_round(
    engine: TransformersEngine, prompts: list[tuple[int, ...]], alphas: list[float], tokens: int
) -> float:
    """Tokens a second."""
    works = [
        Generation(Prompt(ids=p), alphas[i % len(alphas)], tokens, temperature=0.0)
        for i, p in enumerate(prompts)
    ]

    async def drain(answer: Any) -> int:
        last = 0
        async for piece in answer:
            last = piece.completion_tokens
        return last

    begun = time.perf_counter()
    made = await asyncio.gather(*(drain(answer) for answer in await engine.submit(works)))
    seconds = time.perf_counter() - begun
    assert made == [tokens] * len(prompts)
    return sum(made) / seconds


async def measure(
    engines: dict[str, tuple[TransformersEngine, list[float], bool]],
    prompts: list[tuple[int, ...]],
    tokens: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Tokens a second of every engine, by round."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for done in range(rounds + 1):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            engine, alphas, plain = engines[name]
            with unsplit(plain):
                # A thread for each round: an idle one would still hold its share of the cores.
                engine._stopping = False
                await engine.start()
                gc.collect()  # now, and not in the middle of somebody's turn
                rate = await one_round(engine, prompts, alphas, tokens)
                await engine.stop()
            if done:  # the first round warms up
                rates[name].append(rate)
    return rates


def median_interval(values: list[float]) -> tuple[float, float]:
    """Order statistics between which the median of what `values` are drawn from lies, with 95 %.

    Their number is binomial: no distribution is assumed. Below six values, all of them.
    """
    ordered, count = sorted(values), len(values)
    outside, below = 0.0, 0
    while (outside := outside + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    at = max(below - 1, 0)
    return ordered[at], ordered[-1 - at]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("split", type=Path)
    parser.add_argument("--original", help="default: the embedded SmolLM2")
    parser.add_argument("--dense", action="store_true", help="unpack the base, as serve --dense")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    limits = Limits(rows=arguments.rows, queue=arguments.requests)
    split = load_for_serving(arguments.split, dtype, arguments.dense)
    with unsplit(True):
        name = arguments.original or str(embedded_model_path())
        original = WithoutEnd(load_original(name, dtype, split), limits)
    engine = WithoutEnd(split, limits)
    ids = [i for text in general_text() for i in split.tokenizer(text).input_ids]
    step = arguments.prompt_tokens
    prompts = [tuple(ids[i * step : (i + 1) * step]) for i in range(arguments.requests)]
    engines = {
        ORIGINAL: (original, [0.0], True),
        "alpha 0": (engine, [0.0], False),
        "alpha 1": (engine, [1.0], False),
        "mixed alphas": (engine, [0.0, 1.0, 0.5, 0.0], False),
    }
    rates = asyncio.run(measure(engines, prompts, arguments.tokens, arguments.rounds))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    by_round = {
        name: [rate / original for rate, original in zip(values, rates[ORIGINAL], strict=True)]
        for name, values in rates.items()
    }
    ratios = {name: statistics.median(values) for name, values in by_round.items()}
    intervals = {name: median_interval(values) for name, values in by_round.items()}
    bars = {name: ratios[name] >= least for name, least in BARS.items()}
    table = Table("", "tokens/s", "of the original", "95 %", "bar")
    for name, value in medians.items():
        bar = f">= {BARS[name]}: {'holds' if bars[name] else 'FALLS SHORT'}" if name in BARS else ""
        low, high = intervals[name]
        table.add_row(name, f"{value:.1f}", f"{ratios[name]:.3f}", f"{low:.3f} - {high:.3f}", bar)
    Console().print(table)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "split", "original")}
    write_json(
        arguments.json,
        {
            "settings": settings,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "tokens_per_second": rates,
            "median": medians,
            "ratio_by_round": by_round,
            "ratio": ratios,
            "ratio_interval": intervals,
            "bars": {name: {"at_least": BARS[name], "holds": bars[name]} for name in BARS},
        },
    )
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
