"""What does a split layer cost beside nn.Linear, and what do the ortho stream and alpha add?

    python benchmarks/linear.py [--quick] [--json FILE] [--bars FILE]

Three shapes, three numbers of rows, x in bf16. Every variant has as many copies of its weights as
no cache holds, and takes them in turn. Weights are random: time does not depend on their values.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import BARS, Bar, Rounds, at_least, at_most, keep
from torch import Tensor, nn

from libortho import OrthoLinear, set_alpha
from libortho.base import BaseStream, Int4Base, Int8Base, set_int8_activations
from libortho.cli.console import write_json
from libortho.evaluation.tofu import versions
from libortho.kernels import native
from libortho.ortho import LowRankOrtho, OrthoStream, SparseOrtho

SHAPES = [(576, 1536), (2048, 5632), (4096, 11008)]
LARGE = SHAPES[1:]
ROWS = [1, 16, 256]
RANK, DENSITY, GROUP = 4, 0.005, 64
COLD_BYTES = 192 * 2**20
"""Copies of a variant's weights take at least this much: more than a server's last cache."""

Variant = Callable[[int], object]


def copies(nbytes: int) -> int:
    return max(2, -(-COLD_BYTES // nbytes))


def int8_base(shape: tuple[int, int]) -> Int8Base:
    qdata = torch.randint(-127, 128, shape, dtype=torch.int8)
    return Int8Base(qdata, torch.rand(shape[0], 1) / 1000)


def int4_base(shape: tuple[int, int]) -> Int4Base:
    out_features, in_features = shape
    groups = in_features // GROUP
    return Int4Base(
        torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8),
        (torch.rand(out_features, groups) / 1000).bfloat16(),
        torch.randint(0, 241, (out_features, groups)).to(torch.uint8),
    )


def low_rank(shape: tuple[int, int]) -> LowRankOrtho:
    left, right = torch.randn(shape[0], RANK), torch.randn(RANK, shape[1])
    return LowRankOrtho((left / 100).half(), (right / 100).half())


def sparse(shape: tuple[int, int]) -> SparseOrtho:
    count = round(DENSITY * shape[0] * shape[1])
    places = torch.randperm(shape[0] * shape[1])[:count].sort().values
    crow = torch.zeros(shape[0] + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(places // shape[1], minlength=shape[0]).cumsum(0)
    return SparseOrtho(crow, (places % shape[1]).int(), torch.randn(count).half() / 100, shape)


def layers(bases: list[BaseStream], ortho: OrthoStream | None, alpha: object) -> list[OrthoLinear]:
    made = []
    for base in bases:
        layer = OrthoLinear.from_streams(base, copy.deepcopy(ortho))
        set_alpha(layer, alpha)
        made.append(layer)
    return made


def in_turn(modules: list[nn.Module], x: Tensor) -> Variant:
    def run(number: int) -> object:
        return modules[number % len(modules)](x)

    return run


class Shape:
    """The layers of one shape, made once for all numbers of rows."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        numel = shape[0] * shape[1]

        def linear(dtype: torch.dtype) -> list[nn.Module]:
            count = copies(numel * dtype.itemsize)
            made = [nn.Linear(shape[1], shape[0], bias=False, dtype=dtype) for _ in range(count)]
            return [layer.requires_grad_(False) for layer in made]

        self.fp32, self.bf16 = linear(torch.float32), linear(torch.bfloat16)
        self.int8 = [int8_base(shape) for _ in range(copies(numel))]
        self.int4 = [int4_base(shape) for _ in range(copies(numel // 2))]
        self.low_rank, self.sparse = low_rank(shape), sparse(shape)

    def bytes_over_bf16(self, base: BaseStream) -> float:
        return (base.nbytes + self.sparse.nbytes) / (2 * self.shape[0] * self.shape[1])

    def measure(self, rows: int, rounds: int, seconds: float) -> Rounds:
        x = torch.randn(rows, self.shape[1])
        half = x.bfloat16()
        per_row = torch.linspace(0, 1, rows)
        bare = layers(self.int8, None, 0)
        rounded = [Int8Base(base.qdata, base.scale) for base in self.int8]
        variants = {
            "fp32": in_turn(self.fp32, x),
            "bf16": in_turn(self.bf16, half),
            "INT8": in_turn(bare, half),
            "INT8, rank 4, alpha 0": in_turn(layers(self.int8, self.low_rank, 0), half),
            "INT8, rank 4, alpha 1": in_turn(layers(self.int8, self.low_rank, 1), half),
            "INT8, rank 4, alpha per row": in_turn(layers(self.int8, self.low_rank, per_row), half),
            "INT8, CSR 0.5 %, alpha 0": in_turn(layers(self.int8, self.sparse, 0), half),
            "INT8, CSR 0.5 %, alpha 1": in_turn(layers(self.int8, self.sparse, 1), half),
            "INT8, CSR 0.5 %, alpha per row": in_turn(
                layers(self.int8, self.sparse, per_row), half
            ),
            "INT4": in_turn(layers(self.int4, None, 0), half),
        }
        if rows > 1:
            eight = nn.ModuleList(layers(rounded, None, 0))
            set_int8_activations(eight)
            variants["INT8, INT8 activations"] = in_turn(list(eight), half)
        return Rounds(variants, rounds, seconds)


def bars_of(shape: tuple[int, int], rows: int, found: Rounds) -> list[Bar]:
    name = f"{shape[0]} x {shape[1]}, {rows} row{'s' if rows > 1 else ''}"
    bars = []
    if rows == 1:
        bars.append(at_least(f"{name}, INT8 over bf16", found.ratio("bf16", "INT8"), 2.2))
        if shape in LARGE:
            bars.append(at_least(f"{name}, INT8 over fp32", found.ratio("fp32", "INT8"), 4.5))
        bars.append(at_least(f"{name}, INT4 over INT8", found.ratio("INT8", "INT4"), 1.4))
    else:
        required = 1.0 if rows == 16 else 0.95
        bars.append(at_least(f"{name}, INT8 over bf16", found.ratio("bf16", "INT8"), required))
    if rows == 256:
        ratio = found.ratio("bf16", "INT8, INT8 activations")
        bars.append(at_least(f"{name}, INT8 activations over bf16", ratio, 1.8))
    for kind, allowed in (("rank 4", 1.05), ("CSR 0.5 %", 1.10)):
        zero, one, each = (f"INT8, {kind}, alpha {a}" for a in ("0", "1", "per row"))
        bars.append(at_most(f"{name}, {kind}, alpha 1 to 0", found.ratio(one, zero), allowed))
        bars.append(at_most(f"{name}, {kind}, alpha 0 to bare", found.ratio(zero, "INT8"), 1.01))
        if rows > 1:
            bars.append(
                at_most(f"{name}, {kind}, alpha per row to 1", found.ratio(each, one), 1.03)
            )
    return bars


def ceilings(rounds: int) -> dict[str, float]:
    """What the machine gives: bytes a second that are read, and bf16 flops a second."""
    memory = [torch.zeros(2**26) for _ in range(2)]
    left, right = torch.randn(4096, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    found = Rounds(
        {"read": lambda i: memory[i % 2].sum(), "bf16": lambda i: left @ right}, rounds, 0.05
    )
    return {
        "read_gb_per_s": memory[0].nbytes / found.median("read") / 1e9,
        "bf16_gflop_per_s": 2 * 4096**3 / found.median("bf16") / 1e9,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about two minutes")
    parser.add_argument("--json", type=Path, help="every time, for docs/performance.md")
    parser.add_argument("--bars", type=Path, default=BARS)
    options = parser.parse_args()
    torch.manual_seed(0)
    rounds, seconds = (9, 0.02) if options.quick else (25, 0.06)
    bars, rows_of_table = [], []
    with torch.inference_mode():
        machine = ceilings(5)
        for shape in SHAPES:
            made = Shape(shape)
            name = f"{shape[0]} x {shape[1]}"
            bytes8, bytes4 = (made.bytes_over_bf16(b[0]) for b in (made.int8, made.int4))
            bars.append(at_most(f"{name}, bytes of INT8 + CSR 0.5 % over bf16", bytes8, 0.52))
            bars.append(at_most(f"{name}, bytes of INT4 + CSR 0.5 % over bf16", bytes4, 0.29))
            for rows in ROWS:
                found = made.measure(rows, rounds, seconds)
                bars += bars_of(shape, rows, found)
                rows_of_table += [
                    {"shape": name, "rows": rows, "layer": layer, "ms": found.median(layer) * 1e3}
                    for layer in found.times
                ]
    table = Table(title="one layer, medians", title_justify="left")
    for heading in ("shape", "layer", *(f"{rows} rows, ms" for rows in ROWS)):
        table.add_column(heading, justify="right" if "ms" in heading else "left")
    times = {(r["shape"], r["layer"], r["rows"]): r["ms"] for r in rows_of_table}
    for shape, layer in dict.fromkeys((r["shape"], r["layer"]) for r in rows_of_table):
        cells = (times.get((shape, layer, rows)) for rows in ROWS)
        table.add_row(shape, layer, *("" if ms is None else f"{ms:.3f}" for ms in cells))
    Console(width=110).print(table)
    kernels = "C++ operators" if native.available() else "PyTorch's (C++ operators not built)"
    print(f"kernels: {kernels}; reads {machine['read_gb_per_s']:.1f} GB/s, ", end="")
    print(f"bf16 {machine['bf16_gflop_per_s']:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    holds = keep("linear", bars, options.bars)
    write_json(
        options.json,
        {"ceilings": machine, "kernels": kernels, "rows": rows_of_table, **versions()},
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
