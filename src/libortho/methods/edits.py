"""Low-rank edits of weights, what they cost on retain data, and how a budget is spread over layers.

For a layer with inputs x, M = E_retain[x x^T] + ridge = L L^T: an edit D of its weight changes the
layer's output on retain data by tr(D M D^T) = ||D L||_F^2. In the whitened coordinates D L, plain
Euclidean geometry *is* retain damage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.gram import Gram
from libortho.linalg import cholesky_


@dataclass(frozen=True)
class LowRankEdit:
    """An edit D = left @ right of one weight.

    Attributes:
        left: (out_features, rank) fp32.
        right: (rank, in_features) fp32.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def empty(self) -> bool:
        return self.rank == 0

    def output(self, x: Tensor) -> Tensor:
        """`x @ D.T`, (..., in_features) -> (..., out_features), in the dtype of x."""
        return (x @ self.right.to(x.dtype).T) @ self.left.to(x.dtype).T

    def meets(self, other: LowRankEdit) -> bool:
        """True for equal ranks: `toward` then leads to `other`."""
        return self.rank == other.rank

    def toward(self, other: LowRankEdit, share: float) -> LowRankEdit:
        """The edit a share (0 to 1) of the way to `other`, factor by factor; equal ranks."""
        return LowRankEdit(
            torch.lerp(self.left, other.left, share), torch.lerp(self.right, other.right, share)
        )


@dataclass(frozen=True)
class Metric:
    """The retain metric of one layer.

    Attributes:
        factor: L, (in_features, in_features) lower triangular, fp32; M = L L^T. Its columns are
            contiguous, where the layer is wide.
        scale: what a unit of squared output change costs the model here, relative to other
            layers: the mean squared norm of the loss gradient at the layer's output.
    """

    factor: Tensor
    scale: float = 1.0

    def moment(self) -> Tensor:
        """M = L L^T, (in_features, in_features): E_retain[x x^T] with its ridge."""
        return self.factor @ self.factor.T

    def whiten_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient by D, (out, in) -> gradient by D L: G L^-T."""
        return torch.linalg.solve_triangular(self.factor, gradient.T, upper=False).T

    def unwhiten_rows(self, rows: Tensor) -> Tensor:
        """Rows of D L, (rank, in) -> the same rows of D: R L^-1."""
        return torch.linalg.solve_triangular(self.factor.T, rows.T, upper=True).T


def retain_metric(moment: Gram, ridge: float, scale: float = 1.0, name: str = "") -> Metric:
    """Factor E[x x^T] + ridge * mean diagonal * I.

    Args:
        moment: of in_features, of retain data. A wide layer's factor takes its memory (see
            `cholesky_`): it must not be used any more.
        ridge: see `GeometricConfig`.
        scale: see `Metric`.
        name: for the error.

    Raises:
        ValueError: the moment is zero (the layer's inputs are all zero) or not finite, or the ridge
            is too small for it.
    """
    label = name or "a layer"
    level = float(moment.diagonal().double().mean())
    if not math.isfinite(level) or level <= 0:
        raise ValueError(f"{label}: its retain inputs have mean square {level}")
    try:
        factor = cholesky_(moment.dense(), ridge * level)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    return Metric(factor.float(), scale)


def parameter_budget(shapes: Mapping[str, tuple[int, int]], ortho_ratio: float) -> int:
    """Ortho numbers that may be spent over all layers: floor(ortho_ratio * parameters)."""
    return int(ortho_ratio * sum(rows * columns for rows, columns in shapes.values()))


def allocate(
    strengths: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Ranks per layer, by one threshold on the strength of a direction over all layers.

    Args:
        strengths: layer -> (candidates,) in descending order.
        shapes: layer -> (out_features, in_features); a direction costs their sum.
        budget: numbers that all directions together may take.

    Returns:
        layer -> rank; the strongest directions, as many as the budget pays for. Directions of
        strength zero are left out.
    """
    ranks = dict.fromkeys(strengths, 0)
    candidates = sorted(
        ((float(s), name) for name, values in strengths.items() for s in values if float(s) > 0),
        reverse=True,
    )
    for _, name in candidates:
        cost = sum(shapes[name])
        if cost > budget:
            continue  # too dear for what is left; a smaller layer's direction may not be
        budget -= cost
        ranks[name] += 1
    return ranks
