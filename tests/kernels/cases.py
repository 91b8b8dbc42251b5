"""Stored layers of every kind with what they stand for in float64, for tests of all backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.kernels import reference

# (dtype of x, atol, rtol): outputs are of order 1, sums of up to a few hundred terms.
TOLERANCES = [
    (torch.float64, 1e-6, 1e-6),
    (torch.float32, 2e-5, 2e-5),
    (torch.bfloat16, 6e-2, 2e-2),
    (torch.float16, 1e-2, 4e-3),
]
BASES = ["int8", "int8 groups", "int8 wide groups", "int4", "int4 wide groups", "fp16"]
GROUPS = {"int8 groups": 32, "int8 wide groups": 64, "int4": 64}
"""Columns that share a scale; in others, all of a row do."""
ORTHOS = ["none", "low_rank", "low_rank bf16", "rank 0", "sparse", "sparse fp32", "all zero"]
ALPHAS = ["0", "1", "0.3", "rows"]
# (rows, in_features, out_features): tails of every block size, one of each, and whole blocks.
SHAPES = [
    (1, 64, 32),
    (9, 7, 41),
    (3, 192, 33),
    (2, 4224, 19),
    (17, 320, 67),
    (40, 1100, 50),
    (300, 128, 65),
]


@dataclass(frozen=True)
class Operands:
    """The arguments of `reference.linear` after x."""

    qdata: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    ortho: tuple[Tensor, ...]
    alpha: Tensor | None

    def __call__(self, linear, x: Tensor) -> Tensor:
        return linear(x, self.qdata, self.scale, self.zero, self.bias, self.ortho, self.alpha)

    def to(self, device: str) -> Operands:
        def move(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        ortho = tuple(part.to(device) for part in self.ortho)
        rest = (move(p) for p in (self.qdata, self.scale, self.zero, self.bias))
        return Operands(*rest, ortho, move(self.alpha))


def fits(base: str, in_features: int) -> bool:
    """Whether a base of this kind exists at this width."""
    group = {"int4 wide groups": in_features, **GROUPS}.get(base, 1)
    return in_features % group == 0 and (not base.startswith("int4") or in_features % 32 == 0)


def make(
    base: str, ortho: str, alpha: str, rows: int, in_features: int, out_features: int, bias: bool
) -> Operands:
    """A stored layer whose outputs are of order 1."""
    draw = torch.Generator().manual_seed(in_features * 1000 + out_features)
    shape = (out_features, in_features)
    size = in_features**-0.5
    groups = in_features // GROUPS.get(base, in_features)
    scale = zero = None
    if base.startswith("int8"):
        qdata = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
        scale = torch.rand(out_features, groups, generator=draw) * size / 64
    elif base.startswith("int4"):
        codes = torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)
        qdata = reference.pack_int4(codes)
        scale = (torch.rand(out_features, groups, generator=draw) * size / 4).bfloat16()
        zero = torch.randint(0, 241, (out_features, groups), generator=draw).to(torch.uint8)
    else:
        qdata = (torch.randn(shape, generator=draw) * size).half()
    parts = make_ortho(ortho, shape, size, draw)
    values = None
    if parts:
        values = (
            torch.rand(rows, generator=draw) if alpha == "rows" else torch.tensor([float(alpha)])
        )
    added = torch.randn(out_features, generator=draw) if bias else None
    return Operands(qdata, scale, zero, added, parts, values)


def make_ortho(
    kind: str, shape: tuple[int, int], size: float, draw: torch.Generator
) -> tuple[Tensor, ...]:
    out_features, in_features = shape
    if kind == "none":
        return ()
    if kind.startswith("low_rank") or kind == "rank 0":
        rank = 0 if kind == "rank 0" else 3
        dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float16
        left = torch.randn(out_features, rank, generator=draw).to(dtype)
        return left, (torch.randn(rank, in_features, generator=draw) * size).to(dtype)
    mask = torch.rand(shape, generator=draw) < (0 if kind == "all zero" else 0.05)
    mask[::2] = False  # empty rows, the first among them
    dense = (torch.randn(shape, generator=draw) * size * 5).half()
    row, col = mask.nonzero(as_tuple=True)
    crow = torch.zeros(out_features + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(row, minlength=out_features).cumsum(0)
    values = dense[row, col]
    return crow, col.int(), values.float() if kind.endswith("fp32") else values


def exact(operands: Operands, x: Tensor) -> Tensor:
    """`reference.linear` in float64 of the given x."""
    wide = Operands(
        operands.qdata,
        operands.scale,
        operands.zero,
        None if operands.bias is None else operands.bias.double(),
        operands.ortho,
        None if operands.alpha is None else operands.alpha.double(),
    )
    return wide(reference.linear, x.double())


def all_cases() -> list[tuple[str, str, str]]:
    """Every base with every ortho stream, and every alpha with one of each kind of stream."""
    cases = [(base, ortho, "0.3") for base in BASES for ortho in ORTHOS]
    cases += [(b, o, a) for b in ("int8", "int4") for o in ("low_rank", "sparse") for a in ALPHAS]
    return cases
