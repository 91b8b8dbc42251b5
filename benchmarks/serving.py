"""What does the switch cost? The engine over a split, beside itself over the original model.

    python benchmarks/serving.py SPLIT [--original MODEL] [--json FILE]

The same continuous batching runs the original model, as transformers loads it, and the split: at
alpha 0, at alpha 1, and at mixed alphas. Answers are greedy, of a fixed length and from the same
prompts. A machine that others use changes its speed from one second to the next, by more than what
is asked here. So all variants are under way at once, and take turns: one step of each (the prompts,
or one token for every row), in an order drawn anew for each step. A round is one answer to every
prompt; what counts is the ratio of its seconds to the original's *of the same round*: the median
over the rounds, with an interval that holds the true median with 95 %. Two bars, on those medians:
tokens a second at alpha 0 at least 0.95 of the original's, at alpha 1 at least 0.90.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import keep_memory
from transformers import AutoModelForCausalLM

from libortho.cli.console import write_json
from libortho.data.embedded import embedded_model_path
from libortho.data.general import general_text
from libortho.evaluation.tofu import versions
from libortho.serve import rows
from libortho.serve.engine import Answer, Generation, Prompt
from libortho.serve.engine_transformers import TransformersEngine
from libortho.serve.limits import Limits
from libortho.serve.loading import Loaded, load_for_serving

BARS = {"alpha 0": 0.95, "alpha 1": 0.90}
ORIGINAL = "original"


class InSteps(TransformersEngine):
    """Takes a step when it is told to, not in a thread of its own, and never ends an answer early.

    Several threads would not do here: the cores' workers of an idle one go on spinning for a while.
    """

    def __init__(self, loaded: Loaded, limits: Limits) -> None:
        super().__init__(loaded, limits)
        self._ends = frozenset()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.current_thread()

    def step(self) -> float:
        """Seconds of one turn."""
        begun = time.perf_counter()
        self._turn()
        return time.perf_counter() - begun


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


@dataclass(frozen=True)
class Variant:
    """One row of the table: an engine, what alphas its requests ask for, whether it is unsplit."""

    engine: InSteps
    alphas: list[float]
    plain: bool = False

    async def ask(self, prompts: list[tuple[int, ...]], tokens: int) -> list[Answer]:
        """Put all prompts into the queue."""
        return await self.engine.submit(
            [
                Generation(Prompt(ids=p), self.alphas[i % len(self.alphas)], tokens, temperature=0)
                for i, p in enumerate(prompts)
            ]
        )


async def last_count(answer: Answer) -> int:
    """Tokens made, by the answer's own count."""
    count = 0
    async for piece in answer:
        count = piece.completion_tokens
    return count


async def measure(
    variants: dict[str, Variant], prompts: list[tuple[int, ...]], tokens: int, rounds: int
) -> dict[str, list[list[float]]]:
    """Seconds of every step of every variant, by round; the first step is that of the prompts."""
    keep_memory()
    for variant in variants.values():
        await variant.engine.start()
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    names, draw = list(variants), random.Random(0)
    for done in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        answers = {name: await each.ask(prompts, tokens) for name, each in variants.items()}
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(tokens - 1):  # the first step makes two
            draw.shuffle(names)
            for name in names:
                with unsplit(variants[name].plain):
                    taken[name].append(variants[name].engine.step())
        for name, made in answers.items():
            assert [await last_count(answer) for answer in made] == [tokens] * len(prompts)
            if done:  # the first round warms up
                seconds[name].append(taken[name])
    return seconds


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
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    limits = Limits(rows=arguments.rows, queue=arguments.requests)
    split = load_for_serving(arguments.split, dtype, arguments.dense)
    with unsplit(True):
        name = arguments.original or str(embedded_model_path())
        original = InSteps(load_original(name, dtype, split), limits)
    ids = [i for text in general_text() for i in split.tokenizer(text).input_ids]
    step = arguments.prompt_tokens
    prompts = [tuple(ids[i * step : (i + 1) * step]) for i in range(arguments.requests)]
    variants = {
        ORIGINAL: Variant(original, [0.0], plain=True),
        "alpha 0": Variant(InSteps(split, limits), [0.0]),
        "alpha 1": Variant(InSteps(split, limits), [1.0]),
        "mixed alphas": Variant(InSteps(split, limits), [0.0, 1.0, 0.5, 0.0]),
    }
    steps = asyncio.run(measure(variants, prompts, arguments.tokens, arguments.rounds))
    seconds = {name: [sum(taken) for taken in rounds] for name, rounds in steps.items()}
    made = arguments.tokens * arguments.requests
    rates = {name: [made / taken for taken in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    by_round = {
        name: [rate / original for rate, original in zip(values, rates[ORIGINAL], strict=True)]
        for name, values in rates.items()
    }
    ratios = {name: statistics.median(values) for name, values in by_round.items()}
    intervals = {name: median_interval(values) for name, values in by_round.items()}
    first = {name: statistics.median(taken[0] for taken in steps[name]) for name in steps}
    later = {
        name: statistics.median(t for taken in steps[name] for t in taken[1:]) for name in steps
    }
    bars = {name: ratios[name] >= least for name, least in BARS.items()}
    table = Table("", "tokens/s", "of the original", "95 %", "bar", "prompts, ms", "a step, ms")
    for name, value in medians.items():
        bar = f">= {BARS[name]}: {'holds' if bars[name] else 'FALLS SHORT'}" if name in BARS else ""
        low, high = intervals[name]
        table.add_row(
            name,
            f"{value:.1f}",
            f"{ratios[name]:.3f}",
            f"{low:.3f} - {high:.3f}",
            bar,
            f"{first[name] * 1000:.0f}",
            f"{later[name] * 1000:.0f}",
        )
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
            "seconds_of_prompts": first,
            "seconds_of_step": later,
            "ratio_by_round": by_round,
            "ratio": ratios,
            "ratio_interval": intervals,
            "bars": {name: {"at_least": BARS[name], "holds": bars[name]} for name in BARS},
        },
    )
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
