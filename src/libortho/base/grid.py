"""Which numbers a stored weight may take, and how that grid is laid over the weight.

In a group of columns the grid is scale * (code - zero), with codes low..high. A method of rounding
(nearest, error feedback) chooses codes; the grid is settled before, and as it will be stored, so
that its own rounding costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from libortho.config import BaseConfig
from libortho.kernels import reference

INT8_MAX = 127
INT4_MAX = 15

CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.70)
"""Shares of a group's range that scale="search" tries. For INT4, each end by itself: 36 ranges."""


@dataclass(frozen=True)
class Grid:
    """A grid for a (rows, columns) weight, one per row and group of neighbouring columns.

    Attributes:
        scale: (rows, groups), > 0, fp32 for int8 and bf16 for int4.
        zero: (rows, groups) uint8, in 16ths of a code; None where it is 0 (int8).
        low, high: least and greatest code.
    """

    scale: Tensor
    zero: Tensor | None
    low: int
    high: int

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    def numbers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and zero, (rows, groups) each, as numbers of `dtype`; zero in codes."""
        scale = self.scale.to(dtype)
        if self.zero is None:
            return scale, torch.zeros_like(scale)
        return scale, self.zero.to(dtype) / reference.ZERO_STEPS

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes of the nearest numbers on the grid, (rows, columns) int8 or uint8."""
        dtype = torch.uint8 if self.low >= 0 else torch.int8
        codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows in reference.row_blocks(weight.shape[0], weight.shape[1], 4):
            grouped = weight[rows].float().reshape(-1, self.groups, weight.shape[1] // self.groups)
            scale, zero = (part[rows].unsqueeze(-1) for part in self.numbers(torch.float32))
            nearest = nearest_codes(grouped, scale, zero, self.low, self.high)
            codes[rows] = nearest.reshape(-1, weight.shape[1]).to(dtype)
        return codes


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """round(weight / scale + zero), clamped to low..high, as floating numbers."""
    return (weight / scale).add_(zero).round_().clamp_(low, high)


def check_width(columns: int, config: BaseConfig, name: str = "the layer") -> None:
    """Raise ValueError where a layer of `columns` input features cannot be stored so."""
    if config.storage == "int4" and columns % 2:
        raise ValueError(
            f"storage='int4' packs two columns to a byte, and {name} has {columns} input "
            "features: expected an even number; use storage='int8'"
        )
    group = config.group_size or columns
    if config.storage != "fp16" and columns % group:
        whole_row = "None for one scale a row" if config.storage == "int8" else "storage='int8'"
        raise ValueError(
            f"group_size={group} does not divide the {columns} input features of {name}; "
            f"use a divisor of them, or {whole_row}"
        )


def choose_grid(weight: Tensor, config: BaseConfig, importance: Tensor | None = None) -> Grid:
    """Lay a grid over a weight as `config.scale` says.

    scale="search" takes, for every row and group, the range with the least
    sum_c importance_c (w_c - nearest_c)^2 among those that clip its ends by `CLIPS` (both by the
    same share for int8, whose grid is symmetric). The grid of int4 always holds 0 up to the
    rounding of its zero point.

    Args:
        weight: (rows, columns), any floating dtype, finite.
        config: with storage "int8" or "int4".
        importance: (columns,), >= 0; 1 each where it is None. Read with scale="search" only.

    Raises:
        ValueError: the group size does not divide the columns, or int4 with odd columns.
    """
    rows, columns = weight.shape
    check_width(columns, config)
    group = config.group_size or columns
    int4 = config.storage == "int4"
    shape = (rows, columns // group)
    scale = torch.empty(
        shape, dtype=torch.bfloat16 if int4 else torch.float32, device=weight.device
    )
    zero = torch.empty(shape, dtype=torch.uint8, device=weight.device) if int4 else None
    grid = Grid(scale, zero, *((0, INT4_MAX) if int4 else (-INT8_MAX, INT8_MAX)))
    if importance is not None:
        importance = importance.float().reshape(columns // group, group)
    for block in reference.row_blocks(rows, columns, 4):
        grouped = weight[block].float().reshape(-1, columns // group, group)
        low, high = _ends(grouped, config)
        if config.scale == "search":
            low, high = _search(grouped, low, high, importance, int4)
        scale[block], part = _stored(low, high, int4)
        if zero is not None:
            zero[block] = part
    return grid


def _ends(grouped: Tensor, config: BaseConfig) -> tuple[Tensor, Tensor]:
    """The range (rows, groups) of each group of (rows, groups, group) before any search."""
    if config.storage == "int4":
        return grouped.amin(dim=-1).clamp_max(0), grouped.amax(dim=-1).clamp_min(0)
    magnitude = grouped.abs()
    reach = largest = magnitude.amax(dim=-1)
    if config.scale == "percentile":
        # torch.quantile refuses inputs over 2**24 elements and is slower; sorting a row is
        # exact. "higher" interpolation: the smallest stored value that covers the fraction.
        group = grouped.shape[-1]
        rank = min(group, max(1, math.ceil(config.percentile * group)))
        reach = magnitude.kthvalue(rank, dim=-1).values
        # A sparse row can have a percentile of zero though it is not empty: its own maximum
        # then serves, since a scale of zero would lose the row.
        reach = torch.where(reach > 0, reach, largest)
    return -reach, reach


def _stored(low: Tensor, high: Tensor, int4: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero, as they are stored, of the grid that spans low..high."""
    scale = ((high - low) / INT4_MAX).bfloat16() if int4 else high / INT8_MAX
    # An all-zero group is zero under any scale; 1 avoids 0 / 0.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if not int4:
        return scale, torch.zeros_like(scale)
    steps = (-low / scale.float() * reference.ZERO_STEPS).round_()
    return scale, steps.clamp_(0, reference.ZERO_STEPS * INT4_MAX).to(torch.uint8)


def _search(
    grouped: Tensor, low: Tensor, high: Tensor, importance: Tensor | None, int4: bool
) -> tuple[Tensor, Tensor]:
    best = torch.full_like(low, math.inf)
    best_low, best_high = low, high
    least, most = (0, INT4_MAX) if int4 else (-INT8_MAX, INT8_MAX)
    for first, second in product(CLIPS, CLIPS) if int4 else zip(CLIPS, CLIPS, strict=True):
        scale, zero = (
            part.float().unsqueeze(-1) for part in _stored(first * low, second * high, int4)
        )
        zero = zero / reference.ZERO_STEPS
        error = nearest_codes(grouped, scale, zero, least, most)
        error = error.sub_(zero).mul_(scale).sub_(grouped).square_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(dim=-1)
        better = total < best
        best = torch.where(better, total, best)
        best_low = torch.where(better, first * low, best_low)
        best_high = torch.where(better, second * high, best_high)
    return best_low, best_high
