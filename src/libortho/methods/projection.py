"""An edit in closed form: no gradients.

U are the leading eigenvectors of L^-1 S_f L^-T, the directions in which forget inputs outweigh
retain inputs most; D = -W L U U^T L^-1 removes the layer's response to them. It also removes what
those inputs are good for besides the secret.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.gram import Gram
from libortho.kernels.reference import row_blocks
from libortho.methods.edits import LowRankEdit, Metric, allocate


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
