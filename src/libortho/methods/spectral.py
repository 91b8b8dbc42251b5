"""spectral: the original recipe, which looks at the weight alone.

Truncated SVD, INT8 "manifold projection" of the low-rank part, and a sparse residual in CSR, chosen
by relative error, with an adaptive fallback where the low-rank part is too far from W. It is kept
faithful as the reference. Nothing in a weight alone says what is private, so it does not separate
memory from ability: `experiments/run_tofu_eval.py` shows how far each variant gets.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from libortho.base import BaseStream, quantize
from libortho.config import (
    BaseConfig,
    FactorDtype,
    Scale,
    Selection,
    Storage,
    Svd,
    check_choice,
    check_fraction,
    check_takes_no_moment,
)
from libortho.kernels.reference import row_blocks
from libortho.linalg import low_rank_part, randomized_low_rank_part
from libortho.linear import matches
from libortho.methods.registry import register
from libortho.ortho import SparseOrtho
from libortho.report import Split

RankRatio = float | Mapping[str, float]
BLOCK_BYTES = 16 * 2**20
"""Bytes of a block of rows, as fp32, whose residuals are looked at together."""

EPSILON = 1e-8
"""Added to |W| in the relative error, so that a zero weight divides by something."""


def spectral_base(
    storage: Storage = "int8", scale: Scale | None = None, group_size: int | None = None
) -> BaseConfig:
    """How the original recipe stores a base: INT8 with a percentile scale.

    Args:
        storage, group_size: as `BaseConfig`.
        scale: None is "percentile" for int8, and what `BaseConfig` makes of it otherwise.
    """
    if storage == "int8" and scale is None:
        scale = "percentile"
    return BaseConfig(storage=storage, scale=scale, group_size=group_size)


@dataclass(frozen=True)
class SpectralConfig:
    """Configuration of the spectral method.

    Attributes:
        ortho_ratio: wanted ortho entries over the layer's parameters, a fraction in (0, 1];
            exactly round(ortho_ratio * numel) entries are kept.
        rank_ratio: share of singular values kept, a fraction in (0, 1], or a mapping from
            module-name patterns to fractions (only for whole models).
        use_low_rank: False quantises W itself (the forced fallback).
        svd: "exact" (through the Gram matrix) or "randomized" (faster where the rank is low).
        selection: which residual entries are kept: "relative" |r| / (|W| + 1e-8), "absolute" |r|,
            or "magnitude" |W|.
        base: how the base is stored; rounded to nearest, since no data is looked at.
        ortho_dtype: dtype of the CSR values.
        fallback_error: relative Frobenius error of the low-rank part above which W is quantised
            directly, with a warning.
        seed: of the randomised SVD.
    """

    ortho_ratio: float = 0.005
    rank_ratio: RankRatio = 0.95
    use_low_rank: bool = True
    svd: Svd = "exact"
    selection: Selection = "relative"
    base: BaseConfig = field(default_factory=spectral_base)
    ortho_dtype: FactorDtype = "float16"
    fallback_error: float = 0.20
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("ortho_ratio", self.ortho_ratio)
        if isinstance(self.rank_ratio, Mapping):
            for pattern, value in self.rank_ratio.items():
                check_fraction(f"rank_ratio[{pattern!r}]", value)
        else:
            check_fraction("rank_ratio", self.rank_ratio)
        check_choice("svd", self.svd, Svd)
        check_choice("selection", self.selection, Selection)
        check_choice("ortho_dtype", self.ortho_dtype, FactorDtype)
        check_fraction("fallback_error", self.fallback_error, zero=True)
        check_takes_no_moment(self.base, "spectral")


def rank_ratio_for(rank_ratio: RankRatio, names: Sequence[str]) -> dict[str, float]:
    """One rank_ratio per module name.

    Raises:
        ValueError: a mapping leaves a module without a value, names it twice with different
            values, or has a pattern that fits none.
    """
    if not isinstance(rank_ratio, Mapping):
        return dict.fromkeys(names, rank_ratio)
    ratios: dict[str, float] = {}
    for pattern, value in rank_ratio.items():
        found = [name for name in names if matches(name, pattern)]
        if not found:
            raise ValueError(
                f"rank_ratio names {pattern!r}, which fits none of: {', '.join(names)}"
            )
        for name in found:
            if ratios.setdefault(name, value) != value:
                raise ValueError(f"rank_ratio gives {name} both {ratios[name]} and {value}")
    missing = [name for name in names if name not in ratios]
    if missing:
        raise ValueError(f"rank_ratio has no value for: {', '.join(missing)}")
    return ratios


def split_spectral(weight: Tensor, config: SpectralConfig, name: str = "this layer") -> Split:
    """Split one weight.

    Args:
        weight: (out_features, in_features), any floating dtype, finite.
        config: with a single number as `rank_ratio`.
        name: for the warning and errors.

    Returns:
        A dense base and a CSR ortho stream with exactly round(ortho_ratio * numel) entries.

    Warns:
        UserWarning: the low-rank part misses W by more than `fallback_error`; W is quantised
            directly, and the split's note says so.
    """
    if isinstance(config.rank_ratio, Mapping):
        raise TypeError("rank_ratio is a mapping: one layer needs a number (see rank_ratio_for)")
    weight = weight.float()
    dense, note = weight, ""
    if config.use_low_rank:
        rank = max(1, int(config.rank_ratio * min(weight.shape)))
        if config.svd == "exact":
            dense = low_rank_part(weight, rank)
        else:
            dense = randomized_low_rank_part(weight, rank, seed=config.seed)
        error = _relative_error(dense, weight)
        if error > config.fallback_error:
            note = (
                f"low-rank error {error:.1%} at rank {rank} is above "
                f"{config.fallback_error:.0%}: quantised directly"
            )
            warnings.warn(f"{name}: {note}", UserWarning, stacklevel=2)
            dense = weight
    base = quantize(dense, config.base)
    del dense
    count = round(config.ortho_ratio * weight.numel())
    ortho = _top_residuals(weight, base, config, count)
    return Split(base, ortho, note)


def _relative_error(dense: Tensor, weight: Tensor) -> float:
    """||dense - weight||_F / ||weight||_F, or 0 / 1 for a weight of zeros."""
    error = square = 0.0
    for rows in row_blocks(weight.shape[0], weight.shape[1], 4, BLOCK_BYTES):
        error += float((dense[rows] - weight[rows]).norm()) ** 2
        square += float(weight[rows].norm()) ** 2
    return math.sqrt(error) / (math.sqrt(square) or 1.0)


def _score(residual: Tensor, weight: Tensor, selection: Selection) -> Tensor:
    if selection == "relative":
        return residual.abs() / (weight.abs() + EPSILON)
    return residual.abs() if selection == "absolute" else weight.abs()


def _top_residuals(
    weight: Tensor, base: BaseStream, config: SpectralConfig, count: int
) -> SparseOrtho:
    """The `count` entries of weight - base with the largest score, found block by block.

    What is kept meanwhile is the best of the blocks so far: an entry that is below all of them can
    be none of the best of all.
    """
    scores = weight.new_empty(0)
    places = torch.empty(0, dtype=torch.long, device=weight.device)
    values = weight.new_empty(0)
    columns = weight.shape[1]
    for rows in row_blocks(weight.shape[0], weight.shape[1], 4, BLOCK_BYTES):
        residual = (weight[rows] - base.dequantize(torch.float32, rows)).reshape(-1)
        score = _score(residual, weight[rows].reshape(-1), config.selection)
        if count and len(scores) == count:
            able = (score > scores.min()).nonzero().squeeze(1)
        else:
            able = torch.arange(len(score), device=score.device)
        scores = torch.cat([scores, score[able]])
        places = torch.cat([places, able + rows.start * columns])
        values = torch.cat([values, residual[able]])
        if len(scores) > count:
            scores, best = torch.topk(scores, count, sorted=False)
            places, values = places[best], values[best]
    places, order = places.sort()
    return SparseOrtho.from_entries(
        places, values[order].to(getattr(torch, config.ortho_dtype)), (len(weight), columns)
    )


register("spectral", SpectralConfig)
