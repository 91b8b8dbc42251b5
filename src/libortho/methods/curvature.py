"""curvature: what the loss over general text is flat along is what was memorised. No forget set.

K-FAC writes the Fisher information of a weight as G (x) A, with A = E[x x^T] of its inputs and
G = E[g g^T] of the loss gradients at its outputs. In the eigenbases of the two, entry (j, i) of
the rotated weight C = V_G^T W V_A has curvature mu_j * lambda_i. What many texts share is used
again and again and lies where curvature is high; what a single text needs averages out, and lies
where it is low (Merullo et al. 2025, arXiv 2510.24256). So the entries of the largest
mu_j * lambda_i are kept, up to a share of the whole curvature, and the others, rotated back, are
the memorised part D.

D has full rank, and the ortho stream has not. What it stores are the leading singular directions of
D in the plain Frobenius norm, under one budget for all layers. Plain, because weighting by the
metric would choose the parts of D that matter most to general text, by its inverse those that
nothing ever touches, and what the secret's inputs are is not known here: an expectation over inputs
of every direction alike is the Frobenius norm. What is not stored stays in the base (it could not
come back at alpha = 1), and the report says how much of D that is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from libortho.config import (
    BaseConfig,
    FactorDtype,
    check_choice,
    check_fraction,
    check_takes_no_moment,
)
from libortho.methods.registry import register


@dataclass(frozen=True)
class CurvatureConfig:
    """Configuration of the curvature method.

    Attributes:
        ortho_ratio: budget, ortho numbers over the parameters of all targeted layers, a fraction.
        kept_mass: rho, share of each layer's curvature whose entries count as general, a fraction.
        base: how the base is stored; not by error feedback, for which no moment is taken.
        ortho_dtype: dtype of the factors.
        seed: of sampled labels.
    """

    ortho_ratio: float = 0.01
    kept_mass: float = 0.8
    base: BaseConfig = field(default_factory=BaseConfig)
    ortho_dtype: FactorDtype = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("ortho_ratio", self.ortho_ratio)
        check_fraction("kept_mass", self.kept_mass)
        check_choice("ortho_dtype", self.ortho_dtype, FactorDtype)
        check_takes_no_moment(self.base, "curvature")


def leading_products(rows: Tensor, columns: Tensor, share: float) -> Tensor:
    """Which products rows[j] * columns[i] are the largest, up to a share of their sum.

    One threshold is bisected, on sorted columns and their running sum: no product is formed.

    Args:
        rows: (m,), >= 0.
        columns: (n,), >= 0.
        share: a fraction in (0, 1].

    Returns:
        (m, n) bool; the fewest largest products whose sum is at least `share` of all (equal ones
        together).

    Raises:
        ValueError: all products are zero.
    """
    row, column = rows.double(), columns.double()
    order = column.argsort(descending=True)
    ascending_negative = -column[order]
    running = torch.cat((column.new_zeros(1), column[order].cumsum(0)))
    total = float(row.sum() * column.sum())
    largest = float(row.max() * column.max())
    if not total > 0:
        raise ValueError("there is no curvature: every product of eigenvalues is zero")

    def count(threshold: float) -> Tensor:
        """Per row, how many of the sorted columns make a product of `threshold` or more."""
        least = threshold / row.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.searchsorted(ascending_negative, -least, right=True)

    # In logarithms, down to where a product is beyond float64's resolution of the sum.
    low, high = largest * 1e-20, largest * 2
    best = torch.full((len(row),), len(column), device=row.device)  # all, where that is not enough
    while high > low * (1 + 1e-12):
        middle = (low * high) ** 0.5
        taken = count(middle)
        if float((row * running[taken]).sum()) >= share * total:
            low, best = middle, taken
        else:
            high = middle
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place < best.unsqueeze(1)


def sink_directions(first: Tensor, body: Tensor) -> Tensor:
    """Input directions in which first positions carry more energy than all others in any.

    The first position is an attention sink in many models, with activations so large that they
    would be most of A. It cannot share a scale with the rest, nor be left without protection.

    Args:
        first: (in_features, in_features), E[x_0 x_0^T].
        body: the same of positions >= 1.

    Returns:
        (in_features, r) orthonormal, r >= 0.
    """
    # In fp64: fp32 rounds all eigenvalues by the largest one's last digit, and a sink's may be ten
    # million times the body's. What is rounding would be taken for further sinks.
    values, vectors = torch.linalg.eigh(first.double())
    return vectors[:, values > torch.linalg.eigvalsh(body)[-1]].to(first.dtype)


def memorised_part(
    weight: Tensor, inputs: Tensor, outputs: Tensor, kept_mass: float, sink: Tensor | None = None
) -> Tensor:
    """What is left of a weight without its entries of high curvature.

    Args:
        weight: (out_features, in_features).
        inputs: A, (in_features, in_features), symmetric and positive semi-definite.
        outputs: G, (out_features, out_features), likewise; its scale does not matter.
        kept_mass: rho, share of sum_j mu_j * sum_i lambda_i that is kept.
        sink: (in_features, r) orthonormal directions to which the result does not respond; their
            part of A counts as no curvature.

    Returns:
        D, (out_features, in_features), in the dtype of `inputs`.
    """
    weight = weight.to(inputs.dtype)
    if sink is not None:
        weight = weight - (weight @ sink) @ sink.T
        inputs = inputs - sink @ (sink.T @ inputs)
        inputs = inputs - (inputs @ sink) @ sink.T
    columns, right = torch.linalg.eigh(inputs)
    rows, left = torch.linalg.eigh(outputs)
    general = leading_products(rows.clamp_min(0), columns.clamp_min(0), kept_mass)
    rotated = (left.T @ weight @ right).masked_fill_(general, 0.0)
    part = left @ rotated @ right.T
    # The sink lies in the null space of the deflated A, up to rounding.
    return part if sink is None else part - (part @ sink) @ sink.T


register("curvature", CurvatureConfig)
