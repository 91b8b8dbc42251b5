"""An edit by steepest descent of a forgetting loss in the whitened coordinates, within the budget.

A natural gradient with the Kronecker factor of the inputs in full and that of the outputs as a
scalar. It moves only what the secret's own tokens hang on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.linalg import seeded
from libortho.methods.edits import LowRankEdit, Metric, allocate


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
        self._left = {
            n: torch.zeros(rows, 0, dtype=torch.float32, device=at[n])
            for n, (rows, _) in shapes.items()
        }
        self._right = {
            n: torch.zeros(0, width, dtype=torch.float32, device=at[n])
            for n, (_, width) in shapes.items()
        }
        self._devices = set(at.values())
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
        with seeded(self._seed, *self._devices):
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
            rate: length of a step, relative to the factors' root mean square at the first; that of
                the first call holds for all.
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
