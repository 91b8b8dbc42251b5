"""What does a split cost on more workers, and what would it cost for models that nobody has here?

    python benchmarks/scaling.py [--layers 8] [--cluster]

Three parts. (1) Each step that a layer takes is timed here at two sizes, which gives its rate in
operations a second, and how that rate compares with a matrix product's. (2) With --cluster, the
streamed split of a small random model on a local Ray cluster of one and of two workers, beside this
process alone. (3) A table on paper: operations and bytes of an 8B, a 70B and a 671B model, at the
rates that a GPU would have if each step kept its share of the matrix product's rate. Every
assumption is in `ASSUMED` and in the JSON that is written. Exit status 1 where a step's time grew
with its size by more than three times what its formula says, or less than a third.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from libortho.base import quantize
from libortho.calibration import Moments
from libortho.config import BaseConfig
from libortho.evaluation.tofu import versions
from libortho.files import write_json
from libortho.gram import Gram
from libortho.methods.edits import retain_metric
from libortho.methods.geometric import GeometricConfig
from libortho.methods.spectral import SpectralConfig, split_spectral

RESULT = Path(__file__).parent / "results" / "scaling.json"
GPUS = (8, 16, 32, 64)
SIZES = ((512, 1024), (1024, 2048))
TOKENS = 512
HIDDEN, INNER = 768, 2048
"""Sides of the layers of the model for --cluster: about a second each on one core."""

ASSUMED: dict[str, float] = {
    "gpu_operations_per_second": 4e14,  # of a bf16 matrix product: 40 % of an H100's peak
    "gpu_fp32_over_bf16": 0.06,  # an H100's fp32 units, no tensor cores
    "gpu_fp64_over_bf16": 0.06,  # its fp64 tensor cores are as fast as its fp32 units
    "gpu_bytes": 80e9,
    "usable_share_of_gpu_bytes": 0.9,
    "storage_bytes_per_second": 5e9,  # of each machine
    "network_bytes_per_second": 5e10,  # of each machine: 400 Gbit/s
    "gpus_per_machine": 8,
    "dollars_per_gpu_hour": 2.5,
    "gathered_bytes": 6.4e10,  # --gather 60: of a group of layers' statistics
    "calibration_tokens": 100_000,
    "forget_tokens": 6_000,
    "tokens_per_step": 800,  # of the descent: a batch of answers and one of retain text
}


@dataclass(frozen=True)
class Model:
    """What the table needs to know of a model; layers are the `down_proj` that are split.

    Attributes:
        parameters, active: in all, and those that one token runs through.
        layers: of each: (count, out_features, in_features, share of the tokens that reach it).
    """

    parameters: float
    active: float
    layers: tuple[tuple[int, int, int, float], ...]

    def total(self, cost: Callable[[int, int], float]) -> float:
        """The sum of a cost of (out_features, in_features) over the layers."""
        return sum(count * cost(rows, columns) for count, rows, columns, _ in self.layers)

    @property
    def count(self) -> int:
        return sum(layer[0] for layer in self.layers)


MODELS = {
    "8B (Llama 3)": Model(8.0e9, 8.0e9, ((32, 4096, 14336, 1.0),)),
    "70B (Llama 3)": Model(70.6e9, 70.6e9, ((80, 8192, 28672, 1.0),)),
    # 58 layers of 256 experts, of which a token takes 8, and one that all take; 3 dense layers
    "671B (DeepSeek V3)": Model(
        671e9,
        37e9,
        ((3, 7168, 18432, 1.0), (58, 7168, 2048, 1.0), (58 * 256, 7168, 2048, 8 / 256)),
    ),
}

# Operations of each step of a layer (out_features m, in_features n).
OPERATIONS: dict[str, Callable[[int, int], float]] = {
    "product": lambda m, n: 2.0 * TOKENS * m * n,
    "product32": lambda m, n: 2.0 * TOKENS * m * n,
    "product64": lambda m, n: 2.0 * TOKENS * m * n,
    "moment": lambda m, n: 2.0 * TOKENS * n * n,
    "factor": lambda m, n: n**3 / 3,
    "whiten": lambda m, n: 1.0 * m * n * n,
    "quantise": lambda m, n: 1.0 * m * n,
    "spectral": lambda m, n: 2.0 * m * n * min(m, n) + 9.0 * min(m, n) ** 3,
}

PRECISION = {"factor": "product64", "whiten": "product32", "spectral": "product32"}
"""The matrix product that a step's rate is held against; "product" (bf16) for all others."""


def measured_rates() -> dict[str, dict[str, float]]:
    """Step -> operations a second at the larger size, and at both sizes how they compare."""
    seconds: dict[str, list[float]] = {step: [] for step in OPERATIONS}
    generator = torch.Generator().manual_seed(0)
    body, first = torch.ones(1, TOKENS), torch.zeros(1)
    for rows, columns in SIZES:
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        inputs = torch.randn(TOKENS, columns, generator=generator).bfloat16()
        moment = inputs.float().T @ inputs.float() / TOKENS
        metric = retain_metric(Gram.of(moment), 0.1)
        steps: Mapping[str, Callable[[], Any]] = {
            "product": partial(torch.matmul, inputs, weight.bfloat16().T),
            "product32": partial(torch.matmul, inputs.float(), weight.T),
            "product64": partial(torch.matmul, inputs.double(), weight.double().T),
            "moment": partial(moment_of, inputs, body, first),
            "factor": partial(retain_metric, Gram.of(moment), 0.1),
            "whiten": partial(metric.whiten_gradient, weight),
            "quantise": partial(quantize, weight, BaseConfig()),
            "spectral": partial(split_spectral, weight, SpectralConfig()),
        }
        for step, work in steps.items():
            seconds[step].append(best(work))
    return {
        step: {
            "operations_per_second": count(*SIZES[1]) / seconds[step][1],
            "seconds_small": seconds[step][0],
            "seconds_large": seconds[step][1],
            # 1 where the formula has the right exponent, and nobody else used the machine
            "growth_over_formula": seconds[step][1]
            / seconds[step][0]
            / (count(*SIZES[1]) / count(*SIZES[0])),
        }
        for step, count in OPERATIONS.items()
    }


def moment_of(inputs: torch.Tensor, body: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The second moment of a text, from nothing."""
    moments = Moments.zeros(inputs.shape[-1], inputs.device)
    moments.add(inputs, body, first)
    return moments.body.dense()


def best(work: Callable[[], Any], rounds: int = 5) -> float:
    """Seconds: the least of some rounds, the one that was disturbed least."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def on_paper(model: Model, gpus: int, share: Mapping[str, float]) -> dict[str, float]:
    """Hours, bytes and dollars of one split by the default method.

    Args:
        share: step -> its rate over that of a matrix product in its precision.
    """
    a = ASSUMED
    product = a["gpu_operations_per_second"]
    narrow = {"factor": a["gpu_fp64_over_bf16"], "whiten": a["gpu_fp32_over_bf16"]}
    rate = {step: product * narrow.get(step, 1.0) * share[step] for step in OPERATIONS}
    moments = model.total(lambda m, n: 2 * 4.0 * n * n)
    # A group of layers is gathered and factored before the next one: a replica holds all weights
    # and factors, and one group's moments; the calibration text runs once for each group.
    largest = max(2 * 4.0 * n * n for _, _, n, _ in model.layers)
    group = min(moments, max(a["gathered_bytes"], largest))
    groups = math.ceil(moments / group)
    needed = 2 * model.parameters + group + model.total(lambda m, n: 4.0 * n * n)
    usable = a["gpu_bytes"] * a["usable_share_of_gpu_bytes"]
    span = max(1, math.ceil(needed / usable))
    replicas = gpus // span
    if replicas == 0:
        return {"gpus_of_a_replica": span, "replicas": 0, "needed_bytes": needed}
    # A replica's GPUs hold consecutive layers and take turns (device_map), so one of them works.
    tokens = a["calibration_tokens"] + a["forget_tokens"]
    forward = groups * 2 * model.active * tokens / rate["product"]
    squares = sum(c * 2 * s * tokens * n * n for c, _, n, s in model.layers) / rate["moment"]
    method = GeometricConfig()
    found = method.find_steps * (
        6 * model.active * a["forget_tokens"] / rate["product"]
        + model.total(OPERATIONS["whiten"]) / rate["whiten"]
    )
    fitted = method.fit_steps * 6 * model.active * a["tokens_per_step"] / rate["product"]
    machines = math.ceil(gpus / a["gpus_per_machine"])
    reading = 2 * model.parameters * replicas
    moved = (replicas - 1) * moments + 2 * model.parameters * replicas
    stages = {
        "load": reading / (machines * a["storage_bytes_per_second"]),
        "statistics": (forward + squares) / replicas,
        "reduce": (replicas - 1) * moments / (machines * a["network_bytes_per_second"]),
        "factor": model.total(OPERATIONS["factor"]) / rate["factor"] / min(gpus, model.count),
        "descent": found + fitted,
        "quantise": model.total(OPERATIONS["quantise"]) / rate["quantise"] / min(gpus, model.count),
        "write": 2 * model.parameters / a["storage_bytes_per_second"],
    }
    hours = sum(stages.values()) / 3600
    return {
        "gpus_of_a_replica": span,
        "replicas": replicas,
        "groups_of_layers": groups,
        "needed_bytes": needed,
        "bytes_of_a_gpu": needed / span,
        "moved_bytes": moved,
        "hours": hours,
        "dollars": hours * gpus * a["dollars_per_gpu_hour"],
        **{f"seconds_{stage}": value for stage, value in stages.items()},
    }


def cluster(layers: int) -> dict[str, Any]:
    """Seconds of the streamed split of a random model: this process, and Ray's workers."""
    import ray
    from transformers import LlamaConfig, LlamaForCausalLM

    from libortho import SeparationConfig
    from libortho.integrations.ray import RayWorkers
    from libortho.streaming import separate_streamed

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    torch.set_num_threads(1)
    found: dict[str, Any] = {"layers": layers, "shape": [HIDDEN, INNER]}
    with tempfile.TemporaryDirectory() as name:
        model, how = Path(name) / "model", SeparationConfig(SpectralConfig())
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().save_pretrained(model)

        def run(label: str, workers: Any) -> float:
            report = separate_streamed(str(model), Path(name) / label, how, workers=workers)
            return report.seconds["solve"]

        found["alone"] = run("alone", None)
        for count in (1, 2):
            ray.init(num_cpus=count, include_dashboard=False, logging_level="error")
            with RayWorkers("auto", str(model)) as workers:
                # The first run starts the workers and imports torch in them.
                found[f"workers_{count}_cold"] = run(f"cold{count}", workers)
                warm = [run(f"warm{count}-{i}", workers) for i in range(3)]
                found[f"workers_{count}"] = statistics.median(warm)
            ray.shutdown()
    found["speed_up"] = found["workers_1"] / found["workers_2"]
    found["overhead"] = found["workers_1"] / found["alone"] - 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of the model for --cluster")
    parser.add_argument("--cluster", action="store_true", help="measure Ray on this machine too")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    measured = cluster(args.layers) if args.cluster else None
    rates = measured_rates()
    speed = {step: rate["operations_per_second"] for step, rate in rates.items()}
    share = {
        step: min(1.0, speed[step] / speed[PRECISION.get(step, "product")]) for step in OPERATIONS
    }
    paper = {
        name: {str(gpus): on_paper(model, gpus, share) for gpus in GPUS}
        for name, model in MODELS.items()
    }
    table = Table("model", "GPUs", "hours", "GB a GPU", "TB moved", "dollars", title="on paper")
    for name, by_gpus in paper.items():
        for gpus, x in by_gpus.items():
            if x["replicas"] == 0:
                told = f"needs {x['gpus_of_a_replica']} GPUs ({x['needed_bytes'] / 1e12:.2f} TB)"
                table.add_row(name, gpus, told, "", "", "")
                continue
            values = (x["hours"], x["bytes_of_a_gpu"] / 1e9, x["moved_bytes"] / 1e12, x["dollars"])
            table.add_row(name, gpus, *(f"{v:.3g}" for v in values))
    Console(width=100).print(table)
    busy = [step for step, rate in rates.items() if not 0.3 < rate["growth_over_formula"] < 3]
    if busy:
        Console().print(f"[red]not to be trusted, was the machine busy?[/] {', '.join(busy)}")
    if measured is not None:
        Console().print(measured)
    write_json(
        args.json,
        {
            "rates": rates,
            "share_of_product": share,
            "untrusted": busy,
            "cluster": measured,
            "assumed": ASSUMED,
            "models": {name: asdict(model) for name, model in MODELS.items()},
            "paper": paper,
            "versions": versions(),
        },
    )
    return 1 if busy else 0


if __name__ == "__main__":
    sys.exit(main())
