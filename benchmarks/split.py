"""What does the split itself cost: seconds and bytes, for one huge layer and for a whole model?

    python benchmarks/split.py [--quick] [--model DIR] [--plot FILE] [--json FILE] [--bars FILE]

Three parts. (1) One layer of a 70B model, 8192 x 28672, by the spectral and by the geometric method
(closed-form edit), each in a process of its own: seconds, and the operating system's peak of
resident memory less what it was with the weight alone. (2) The 30 down_proj layers of the embedded
model, 50,000 tokens: statistics beside bare forward passes over the same batches, taken in turn;
seconds of the geometric solve by projection and, not a bar, by the default descent. (3) Each step's
seconds against the layer's width, the tokens and the number of layers, with fitted exponents, in a
plot. Weights, activations and calibration text beyond the package's own are random: no cost here
depends on their values. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table
from timing import BARS, Bar, at_most, keep
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from libortho.calibration import Moments, second_moments
from libortho.data.embedded import embedded_model_path
from libortho.data.general import general_text
from libortho.data.tasks import embedded_task
from libortho.data.tokens import Batch, Tokens, batches, encode
from libortho.evaluation.canvas import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from libortho.evaluation.finetuned import load_model
from libortho.evaluation.tofu import versions
from libortho.files import write_json
from libortho.goal import choose_goal
from libortho.linear import select_linear
from libortho.methods.descent import Descent
from libortho.methods.edits import Metric, parameter_budget, retain_metric
from libortho.methods.geometric import GeometricConfig
from libortho.methods.projection import Projection
from libortho.methods.spectral import SpectralConfig, split_spectral
from libortho.scoring import sequence_nll
from libortho.solvers.geometric import edit_streams, solve_geometric
from libortho.solvers.problem import Journal, Problem

HERE = Path(__file__).parent
RESULT = HERE / "results" / "split.json"
PLOT = HERE.parent / "docs" / "split_cost.png"
SHAPE = (8192, 28672)
GIB = 2**30
LENGTH = 128
"""Tokens of one random sequence, and of the forget set of one layer times eight."""

SIZES = {False: (512, 1024, 2048, 4096), True: (256, 512, 1024)}
TOKENS = {False: (4096, 8192, 16384, 32768), True: (2048, 4096, 8192)}
LAYERS = {False: (2, 4, 8, 16), True: (1, 2, 4)}


class Stages:
    """Seconds by stage, and the processors' seconds by stage (of all threads together)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, processor = time.perf_counter(), time.process_time()
        yield
        spent = time.process_time() - processor
        self.processor[name] = self.processor.get(name, 0.0) + spent
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def random_weight(shape: tuple[int, int]) -> Tensor:
    """(out, in) bf16, made in blocks: no larger copy of it ever stands in memory."""
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for row in range(0, shape[0], 256):
        block = weight[row : row + 256]
        block.copy_(torch.randn(block.shape) / math.sqrt(shape[1]))
    return weight


def activations(columns: int, scale: Tensor) -> Tensor:
    """(8, LENGTH, columns) bf16 with columns of very different sizes; position 0 is a sink."""
    x = torch.randn(8, LENGTH, columns) * scale
    x[:, 0, : max(1, columns // 1000)] += 100.0
    return x.bfloat16()


def layer_moments(stage: Stages, columns: int, tokens: int) -> tuple[Moments, Moments]:
    """Statistics of one layer's random inputs: of retain text, and of one batch to forget."""
    scale = torch.logspace(0, -2, columns)
    kept, forgotten = (Moments.zeros(columns, torch.device("cpu")) for _ in range(2))
    body, first = torch.ones(8, LENGTH), torch.ones(8)
    body[:, 0] = 0
    for _ in range(-(-tokens // (8 * LENGTH))):
        x = activations(columns, scale)
        with stage("statistics"):
            kept.add(x, body, first)
    x = activations(columns, scale)
    with stage("statistics"):
        forgotten.add(x, body, torch.zeros(8))
        kept.body.dense()
    return kept, forgotten


def factored(stage: Stages, kept: Moments) -> Metric:
    with stage("factor"):
        return retain_metric(kept.mean(), GeometricConfig().ridge)


def split_geometric(stage: Stages, weight: Tensor, tokens: int) -> None:
    """From activations to two streams, by the closed form."""
    method = GeometricConfig()
    kept, forgotten = layer_moments(stage, weight.shape[1], tokens)
    metrics = {"layer": factored(stage, kept)}
    budget = parameter_budget({"layer": (weight.shape[0], weight.shape[1])}, method.ortho_ratio)
    with stage("project"):
        found = Projection({"layer": weight}, metrics, {"layer": forgotten.mean()}, budget)
        edit = found.edits(budget)["layer"]
    with stage("quantise"):
        edit_streams(weight, edit, method.base, method.ortho_dtype)


def descend(stage: Stages, weight: Tensor, tokens: int) -> None:
    """One step that finds directions, from a gradient by the weight; not the passes for it."""
    metric = factored(stage, layer_moments(stage, weight.shape[1], tokens)[0])
    shapes = {"layer": (weight.shape[0], weight.shape[1])}
    gradient = torch.randn(weight.shape) / 1000
    with stage("find"):
        descent = Descent({"layer": metric}, shapes, parameter_budget(shapes, 0.01))
        descent.find(1.0, {"layer": gradient}, 0.4)
        descent.edits()


def spectral(stage: Stages, weight: Tensor, tokens: int) -> None:
    del tokens
    with stage("split"):
        split_spectral(weight, SpectralConfig())


WAYS: dict[str, Callable[[Stages, Tensor, int], None]] = {
    "spectral": spectral,
    "geometric": split_geometric,
    "descent": descend,
}


def one_layer(way: str, shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """Seconds by stage, and the peak of resident memory beyond the weight; in a fresh process."""
    torch.manual_seed(0)
    # Libraries load, and threads start, before anything is counted.
    WAYS[way](Stages(), random_weight((64, 128)), 2 * 8 * LENGTH)
    weight = random_weight(shape)
    before = psutil.Process().memory_info().rss
    stage = Stages()
    WAYS[way](stage, weight, tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {
        "way": way,
        "shape": list(shape),
        "tokens": tokens,
        "seconds": stage.seconds,
        "processor_seconds": stage.processor,
        "extra_bytes": peak - before,
        "weight_bytes": weight.nbytes,
    }


def apart(way: str, shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """`one_layer` in a process of its own, so that its peak is its own."""
    command = [sys.executable, __file__, "--layer", way, *map(str, shape), str(tokens)]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(found.stdout))


def calibration_text(model: Path, tokens: int) -> list[Tokens]:
    """The package's general text, over and over, up to about so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    items = [encode(text, tokenizer) for text in general_text()]
    taken: list[Tokens] = []
    count = 0
    while count < tokens:
        item = items[len(taken) % len(items)]
        taken.append(item)
        count += len(item.ids)
    return taken


def whole_model(path: Path, tokens: int, descent: bool) -> dict[str, Any]:
    """Statistics beside forward passes, and the solve, of all down_proj layers."""
    model = load_model(str(path))
    layers = select_linear(model, "down_proj")
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    retain = calibration_text(path, tokens)
    stage = Stages()
    rounds = max(1, min(10, tokens // 4096))
    moments: dict[str, Moments] = {}
    with torch.no_grad():
        for turn in range(-1, rounds):  # the first is not counted
            items = retain[max(turn, 0) :: rounds]
            turns: dict[str, Callable[[], object]] = {
                "bare": lambda items=items: [forward(model, batch) for batch in batches(items)],
                "statistics": lambda items=items: second_moments(
                    model, layers, items, into=moments
                ),
            }
            for name in sorted(turns, reverse=turn % 2 == 0):
                with stage(name if turn >= 0 else "not counted"):
                    turns[name]()
        with stage("statistics"):
            for found in moments.values():
                found.body.dense()
    moments.clear()
    tokenizer = AutoTokenizer.from_pretrained(path)
    forget = [encode(example, tokenizer) for example in embedded_task().forget]
    # A goal that takes some finding: a nat a token above what the model says now.
    nll = sequence_nll(model, forget)
    said = float(torch.cat(list(nll)).mean()) + 1.0
    goal = choose_goal(model, forget, retain[:8], target_nll=said)
    solved = {}
    for edit in ("projection", "descent") if descent else ("projection",):
        kept = retain if edit == "projection" else retain[: len(retain) // 8 + 1]
        journal = Journal()
        problem = Problem(model, layers, weights, forget, kept, [], goal, journal)
        solve_geometric(problem, GeometricConfig(edit=edit))
        solved[edit] = journal.seconds
    return {
        "layers": len(layers),
        "shape": list(next(iter(weights.values())).shape),
        "tokens": sum(len(item.ids) for item in retain),
        "forget_tokens": sum(item.targets for item in forget),
        "seconds": stage.seconds,
        "processor_seconds": stage.processor,
        "statistics_over_bare": stage.seconds["statistics"] / stage.seconds["bare"],
        "solve": solved,
    }


def forward(model: PreTrainedModel, batch: Batch) -> None:
    model.get_decoder()(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)


def growth(quick: bool) -> dict[str, dict[str, Any]]:
    """Seconds of each step against one size, the others being fixed, and the fitted exponent."""
    sizes, fixed = SIZES[quick], SIZES[quick][1]
    seconds: dict[str, dict[int, float]] = {}

    def note(axis: str, step: str, size: int, value: float) -> None:
        held = seconds.setdefault(f"{axis}: {step}", {})
        held[size] = min(value, held.get(size, math.inf))

    for _ in range(2):  # the lesser of two: the one that was disturbed less
        for width in sizes:
            stage, weight = Stages(), random_weight((width // 2, width))
            split_geometric(stage, weight, 4096)
            spectral(stage, weight, 0)
            for step, value in stage.seconds.items():
                note("width", "spectral" if step == "split" else step, width, value)
        for tokens in TOKENS[quick]:
            stage = Stages()
            layer_moments(stage, fixed, tokens)
            note("tokens", "statistics", tokens, stage.seconds["statistics"])
        for count in LAYERS[quick]:
            stage = Stages()
            for _ in range(count):
                split_geometric(stage, random_weight((fixed // 2, fixed)), 4096)
            note("layers", "geometric", count, sum(stage.seconds.values()))
    return {
        name: {
            "size": list(held),
            "seconds": list(held.values()),
            "exponent": exponent(list(held), list(held.values())),
        }
        for name, held in seconds.items()
    }


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of the least-squares line log(seconds) = p log(size) + c, over the upper half of the sizes
    (at least three), where what a call costs in any case is small."""
    upper = max(3, (len(sizes) + 1) // 2)
    x = torch.tensor(sizes[-upper:], dtype=torch.float64).log()
    y = torch.tensor(seconds[-upper:], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def draw(grown: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel an axis; logarithmic both ways, on white."""
    titles = {"width": "width d of a d/2 x d layer", "tokens": "tokens", "layers": "layers"}
    figure = Figure(figsize=(10.5, 3.9), layout="constrained", facecolor="white")
    for axes, (axis, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        looks = zip((BLUE, VERMILION, GREEN, ORANGE, PURPLE), "osD^v", strict=True)
        for name, found in grown.items():
            if not name.startswith(f"{axis}: "):
                continue
            colour, marker = next(looks)
            label = f"{name.split(': ')[1]}, exponent {found['exponent']:.2f}"
            axes.loglog(found["size"], found["seconds"], color=colour, marker=marker, label=label)
        axes.set_xlabel(title)
        axes.set_xticks(next(f["size"] for n, f in grown.items() if n.startswith(axis)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def bars_of(found: Sequence[dict[str, Any]], model: dict[str, Any]) -> list[Bar]:
    bars = []
    for layer in found:
        if layer["way"] == "descent":
            continue
        name = f"{layer['shape'][0]} x {layer['shape'][1]}, {layer['way']}"
        bars.append(at_most(f"{name}, GiB beyond the weight", layer["extra_bytes"] / GIB, 6))
        bars.append(at_most(f"{name}, minutes", sum(layer["seconds"].values()) / 60, 5))
    name = f"{model['layers']} layers, {model['tokens']} tokens"
    ratio = model["statistics_over_bare"]
    bars.append(at_most(f"{name}, statistics over bare forward passes", ratio, 1.3))
    solve = model["solve"]["projection"]["solve"]
    bars.append(at_most(f"{name}, geometric, projection, seconds of the solve", solve, 15))
    return bars


def show(layers: Sequence[dict[str, Any]], model: dict[str, Any], grown: dict[str, Any]) -> None:
    console = Console(width=110)
    table = Table("one layer", "step", "seconds", "GiB beyond the weight", title_justify="left")
    for layer in layers:
        name = f"{layer['shape'][0]} x {layer['shape'][1]}, {layer['way']}"
        for step, value in layer["seconds"].items():
            table.add_row(name, step, f"{value:.1f}", "")
        table.add_row(name, "peak", "", f"{layer['extra_bytes'] / GIB:.2f}")
    console.print(table)
    table = Table("whole model", "stage", "seconds")
    for stage, value in model["seconds"].items():
        table.add_row("passes in turn", stage, f"{value:.1f}")
    for edit, stages in model["solve"].items():
        for stage, value in stages.items():
            table.add_row(edit, stage, f"{value:.1f}")
    console.print(table)
    table = Table("seconds against", "step", "sizes", "seconds", "exponent")
    for name, found in grown.items():
        axis, step = name.split(": ")
        times = ", ".join(f"{value:.3g}" for value in found["seconds"])
        sizes = ", ".join(map(str, found["size"]))
        table.add_row(axis, step, sizes, times, f"{found['exponent']:.2f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, and no descent")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("OUT", "IN"), help="the one layer's")
    parser.add_argument("--tokens", type=int, help="of the whole model's calibration text")
    parser.add_argument("--model", type=Path, help="a folder; the embedded model by default")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--bars", type=Path, default=BARS)
    parser.add_argument(
        "--layer",
        nargs=4,
        metavar=("WAY", "OUT", "IN", "TOKENS"),
        help="only one layer by one way: a line of JSON",
    )
    options = parser.parse_args(arguments)
    if options.layer:
        way, *numbers = options.layer
        rows, columns, tokens = map(int, numbers)
        print(json.dumps(one_layer(way, (rows, columns), tokens)))
        return 0
    torch.manual_seed(0)
    shape = tuple(options.shape or ((1024, 8704) if options.quick else SHAPE))
    ways = ("spectral", "geometric") if options.quick else tuple(WAYS)
    layers = [apart(way, (shape[0], shape[1]), 8192) for way in ways]
    model = whole_model(
        options.model or embedded_model_path(),
        options.tokens or (4_000 if options.quick else 50_000),
        descent=not options.quick,
    )
    grown = growth(options.quick)
    show(layers, model, grown)
    bars = bars_of(layers, model)
    draw(grown, options.plot)
    holds = keep("split", bars, options.bars)
    write_json(
        options.json,
        {
            "bars": [asdict(bar) for bar in bars],
            "layers": layers,
            "model": model,
            "growth": grown,
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            **versions(),
        },
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
