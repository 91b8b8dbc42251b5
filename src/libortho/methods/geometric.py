"""geometric: move the forget set's predictions, orthogonally to what the retain data uses.

Orthogonal in the metric of the retain data: for a layer with inputs x, M = E_retain[x x^T] + ridge
= L L^T, an edit D of its weight changes the layer's output on retain data by
tr(D M D^T) = ||D L||_F^2. In the whitened coordinates D L, plain Euclidean geometry *is* retain
damage. Two ways to find the edit there; both keep, over all layers together, the directions with
the largest singular values of D L that the budget pays for (one global threshold: ranks per layer
fall out by themselves). The ortho stream is -D, in factors.

- `Projection`: closed form. U are the leading eigenvectors of L^-1 S_f L^-T, the directions in
  which forget inputs outweigh retain inputs most; D = -W L U U^T L^-1 removes the layer's response
  to them. No gradients. It also removes what those inputs are good for besides the secret.
- `Descent`: steepest descent of a forgetting loss in the whitened coordinates (a natural gradient
  with the Kronecker factor of the inputs in full and that of the outputs as a scalar), kept within
  the budget. It moves only what the secret's own tokens hang on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from libortho.config import (
    BaseConfig,
    FactorDtype,
    check_choice,
    check_count,
    check_fraction,
    check_positive,
)
from libortho.gram import Gram
from libortho.kernels.reference import row_blocks
from libortho.linalg import cholesky_
from libortho.methods.registry import register

Edit = Literal["descent", "projection"]


@dataclass(frozen=True)
class GeometricConfig:
    """Configuration of the geometric method.

    Attributes:
        ortho_ratio: budget, ortho numbers over the parameters of all targeted layers, a fraction.
        edit: "descent" (default) or "projection"; see the module's text.
        ridge: lambda, the multiple of the mean diagonal of E[x x^T] added to it.
        find_steps: steps that look for directions (see `Descent`).
        fit_steps: steps at most that then move them, each on a batch of the forget set and one of
            the retain set.
        step: fraction of the Polyak step taken by the first kind; small steps bend with the loss,
            large ones overshoot and pay for it in retain damage.
        rate: length of the second kind's steps, relative to the factors.
        batch: forget sequences per step of the second kind.
        retain_tokens: about how many tokens of retain and general text are in such a step.
        target_nll: nats per token that the forget set should cost at alpha = 0, where no earlier
            model or unseen text says it; see `separate_`.
        tolerance: how far above its target the forget probability may end, as a fraction of the
            target (and by at most 0.05 in all), before the report calls it not reached.
        base: how the base is stored; rounded against the retain metric where it reads a moment.
        ortho_dtype: dtype of the factors.
        seed: of the randomised truncation and of sampled labels.
    """

    ortho_ratio: float = 0.01
    edit: Edit = "descent"
    ridge: float = 0.1
    find_steps: int = 3
    fit_steps: int = 160
    step: float = 0.4
    rate: float = 0.4
    batch: int = 10
    retain_tokens: int = 400
    target_nll: float | None = None
    tolerance: float = 0.4
    base: BaseConfig = field(default_factory=BaseConfig)
    ortho_dtype: FactorDtype = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("ortho_ratio", self.ortho_ratio)
        check_choice("edit", self.edit, Edit)
        check_positive("ridge", self.ridge)
        check_positive("step", self.step)
        check_positive("rate", self.rate)
        check_fraction("tolerance", self.tolerance, zero=True)
        check_choice("ortho_dtype", self.ortho_dtype, FactorDtype)
        check_count("find_steps", self.find_steps, 1)
        check_count("fit_steps", self.fit_steps, 0)
        check_count("batch", self.batch, 1)
        check_count("retain_tokens", self.retain_tokens, 1)
        if self.target_nll is not None:
            check_positive("target_nll", self.target_nll)


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


class Projection:
    """The closed-form edit: remove the directions with most forget energy per retain energy.

    They are found once; an edit is then a matter of how many of them the budget pays for.

    Args:
        weights: layer -> (out_features, in_features).
        metrics: layer -> retain metric.
        forget: layer -> E[x x^T], of in_features, over the positions that predict the secret. One
            that is still rows costs no matrix of in_features squared.
        budget: most ortho numbers over all layers that `edits` will be asked for.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        metrics: Mapping[str, Metric],
        forget: Mapping[str, Gram],
        budget: int,
    ) -> None:
        self._weights, self._metrics, self._budget = weights, metrics, budget
        self._strengths: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            most = min(weight.shape[1], budget // sum(weight.shape))
            found = leading_ratios(metrics[name], forget[name], most)
            self._strengths[name], self._vectors[name] = found

    def edits(self, budget: int) -> dict[str, LowRankEdit]:
        """Layer -> edit; rank 0 where no direction made the threshold.

        Raises:
            ValueError: more than the directions were found for.
        """
        if budget > self._budget:
            raise ValueError(f"budget={budget}: expected at most {self._budget}, as at the start")
        shapes = {n: (w.shape[0], w.shape[1]) for n, w in self._weights.items()}
        ranks = allocate(self._strengths, shapes, budget)
        edits = {}
        for name, weight in self._weights.items():
            metric, basis = self._metrics[name], self._vectors[name][:, : ranks[name]]
            # In blocks: W is never held in fp32.
            carried = metric.factor @ basis
            left = carried.new_empty(weight.shape[0], ranks[name])
            for rows in row_blocks(weight.shape[0], weight.shape[1], 4):
                left[rows] = weight[rows].float() @ carried
            edits[name] = LowRankEdit(left.neg_(), metric.unwhiten_rows(basis.T))
        return edits


def leading_ratios(metric: Metric, forget: Gram, most: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of L^-1 S_f L^-T and their eigenvectors.

    Each is the ratio of a direction's forget energy to its retain energy. Where S_f = R^T R has
    fewer rows than half its width, they come from R L^-T, through the Gram matrix of its rows.

    Args:
        metric: with L.
        forget: S_f.
        most: how many are wanted.

    Returns:
        (k,) descending, and (in_features, k) orthonormal, fp32; k <= most. What is left out of
        what is wanted is zero up to rounding.
    """
    rows = forget.rows
    if rows is None:
        half = torch.linalg.solve_triangular(metric.factor, forget.dense(), upper=False)
        ratio = torch.linalg.solve_triangular(metric.factor, half.T, upper=False)
        values, basis = torch.linalg.eigh(ratio)
        return values.flip(0)[:most].clone(), basis.flip(1)[:, :most].clone()
    white = torch.linalg.solve_triangular(metric.factor, rows.T, upper=False)
    values, basis = torch.linalg.eigh(white.T @ white)
    values, basis = values.flip(0)[:most], basis.flip(1)[:, :most]
    # Below, an eigenvector is rounding.
    alive = int((values > len(rows) * torch.finfo(values.dtype).eps * values[:1]).sum())
    # The span is right; QR makes the basis orthonormal, which small eigenvalues' vectors are not.
    vectors, _ = torch.linalg.qr(white @ basis[:, :alive])
    return values[:alive].clone(), vectors


class Descent:
    """Steepest descent in whitened coordinates within the budget, in two phases.

    `find` takes short Polyak steps and truncates after each: it settles which directions of which
    layers the budget is spent on. `fit` then keeps the ranks and moves both factors of every
    layer's edit (Adam, with steps relative to the factors' own size), which truncation would keep
    undoing. The metric is a prediction of retain damage from the first moment on; what `fit` is
    given may measure it as well.

    Coordinates: Y = sqrt(scale) * D L per layer, so that ||Y||_F^2 summed over layers is the
    predicted retain damage.

    Args:
        metrics: layer -> retain metric.
        shapes: layer -> (out_features, in_features).
        budget: ortho numbers over all layers.
        seed: of the randomised truncation.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        shapes: Mapping[str, tuple[int, int]],
        budget: int,
        seed: int = 0,
    ) -> None:
        self._metrics = metrics
        self._shapes = shapes
        self._budget = budget
        self._seed = seed
        # No layer can usefully take more than a few times its share; this caps the truncated SVD.
        share = budget / sum(sum(shape) for shape in shapes.values())
        self._candidates = max(16, math.ceil(8 * share))
        at = {name: metrics[name].factor.device for name in shapes}
        self._left = {n: torch.zeros(rows, 0, device=at[n]) for n, (rows, _) in shapes.items()}
        self._right = {n: torch.zeros(0, width, device=at[n]) for n, (_, width) in shapes.items()}
        self._devices = [device for device in set(at.values()) if device.type == "cuda"]
        self._optimizer: torch.optim.Adam | None = None

    def _whiten(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self._metrics[name]
            .whiten_gradient(gradient.float())
            .div_(math.sqrt(self._metrics[name].scale))
            for name, gradient in gradients.items()
        }

    def find(self, loss: float, gradients: Mapping[str, Tensor], fraction: float) -> None:
        """Take `fraction` of the Polyak step loss / ||gradient||^2, then truncate to the budget.

        Args:
            loss: current value of a loss whose optimum is about 0.
            gradients: layer -> (out_features, in_features), its gradient by the weight.
            fraction: of the step that would bring a linear loss to 0.
        """
        whitened = self._whiten(gradients)
        square = sum(float(g.square().sum()) for g in whitened.values())
        if square == 0:
            return
        length = fraction * loss / square
        factors, strengths = {}, {}
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(self._seed)
            for name, gradient in whitened.items():
                update = gradient.mul_(-length).addmm_(
                    self._left[name].to(gradient), self._right[name].to(gradient)
                )
                q = min(self._candidates, *update.shape)
                u, strengths[name], v = torch.svd_lowrank(update, q=q, niter=2)
                factors[name] = (u, v.T)
        ranks = allocate(strengths, self._shapes, self._budget)
        for name, (u, v_t) in factors.items():
            root = strengths[name][: ranks[name]].sqrt()
            self._left[name] = (u[:, : ranks[name]] * root).contiguous()
            self._right[name] = (v_t[: ranks[name]] * root.unsqueeze(1)).contiguous()

    def fit(self, gradients: Mapping[str, tuple[Tensor, Tensor]], rate: float) -> None:
        """Move the factors of the directions that `find` chose.

        Args:
            gradients: layer -> gradients of a loss by the factors of `edits()`, (out_features,
                rank) and (rank, in_features) fp32; layers of rank 0 have none.
            rate: length of a step, relative to the factors' root mean square at the first.
        """
        names = [name for name, left in self._left.items() if left.shape[1]]
        sides = ([self._left[n] for n in names], [self._right[n] for n in names])
        if self._optimizer is None:
            groups = [{"params": side, "lr": rate * _root_mean_square(side)} for side in sides]
            self._optimizer = torch.optim.Adam(groups, betas=(0.8, 0.9), eps=1e-12)
        for name, left, right in zip(names, *sides, strict=True):
            by_left, by_right = gradients[name]
            left.grad = by_left / math.sqrt(self._metrics[name].scale)
            right.grad = self._metrics[name].whiten_gradient(by_right)
        self._optimizer.step()

    def edits(self) -> dict[str, LowRankEdit]:
        """The edit so far, in the weights' own coordinates (copies)."""
        return {
            name: LowRankEdit(
                left / math.sqrt(self._metrics[name].scale),
                self._metrics[name].unwhiten_rows(self._right[name]),
            )
            for name, left in self._left.items()
        }

    def damage(self) -> float:
        """Predicted retain damage: ||Y||_F^2 summed over layers."""
        return sum(
            float((left.T @ left * (self._right[name] @ self._right[name].T)).sum())
            for name, left in self._left.items()
        )


def _root_mean_square(tensors: list[Tensor]) -> float:
    square = sum(float(t.square().sum()) for t in tensors)
    return math.sqrt(square / sum(t.numel() for t in tensors))


register("geometric", GeometricConfig)
