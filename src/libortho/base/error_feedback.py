"""Rounding against the data: each column's error is made good by the columns not rounded yet.

GPTQ (Frantar et al. 2022, arXiv 2210.17323, section 3 and algorithm 1) in the form that Chee et al.
2023 (QuIP, arXiv 2307.13304, theorem 6) prove equal to it, which inverts no matrix. With
H = E[x x^T] + damping, the error of a layer's output is ||(W - Q) T||_F^2 for any H = T T^T; take T
upper triangular. Column j of (W - Q) T then depends on columns 0..j of Q alone, and given those
before it, it is least where Q_j is the number nearest to

    w'_j = W_j + sum_{i < j} (W_i - Q_i) T_ij / T_jj,

and ||(W - Q) T||_F^2 = sum_j T_jj^2 ||w'_j - Q_j||^2. So the columns are rounded one after the
other, each to the nearest number of its grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from libortho.base.grid import Grid, nearest_codes
from libortho.kernels import reference
from libortho.linalg import cholesky_

DAMPING = 0.01
"""Multiple of the mean diagonal of the moment that is added to it (the paper's section 3.3)."""

COLUMNS = 128
"""Columns rounded one by one between two matrix products; the paper's block size."""

ROW_BYTES = 256 * 2**20
"""Upper bound, in bytes, of the rows (as fp32) that are rounded at one time."""


def error_feedback(
    weight: Tensor,
    grid: Grid,
    moment: Tensor,
    order: Literal["activation", "natural"] = "activation",
) -> Tensor:
    """Codes on `grid` whose error, weighted by the inputs' second moment, is small.

    Args:
        weight: (rows, columns), any floating dtype, finite; fp64 is computed in fp64, all else
            in fp32.
        grid: for this weight. It stays as it is, in any order of the columns.
        moment: (columns, columns), E[x x^T] of the layer's inputs, positive semi-definite.
        order: "activation" takes the columns by falling diagonal of `moment`, so that those that
            matter most are rounded while most others can still make their error good; "natural"
            from left to right, as in the paper, left 0 to 5 % more weighted error in the layers
            of SmolLM2-135M that it was tried on.

    Returns:
        (rows, columns), int8 or uint8.

    Raises:
        ValueError: the moment is of another shape, zero, not finite, or far from semi-definite.
    """
    columns = weight.shape[1]
    check_moment(moment, columns)
    place = torch.arange(columns, device=weight.device)
    if order == "activation":
        place = moment.diagonal().argsort(descending=True, stable=True).to(weight.device)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    handed_on = _feedback(moment, place).to(weight.device, dtype)
    group = place // (columns // grid.groups)
    codes = torch.empty(
        weight.shape, dtype=torch.uint8 if grid.low >= 0 else torch.int8, device=weight.device
    )
    for rows in reference.row_blocks(weight.shape[0], weight.shape[1], 4, ROW_BYTES):
        scale, zero = (part[rows].T.contiguous() for part in grid.numbers(dtype))
        # Transposed, so that a column is contiguous. Becomes the error, column by column.
        error = weight[rows].to(dtype).T[place]
        found = torch.empty(error.shape, dtype=codes.dtype, device=weight.device)
        for start in range(0, columns, COLUMNS):
            stop = min(start + COLUMNS, columns)
            wanted = torch.addmm(error[start:stop], handed_on[:start, start:stop].T, error[:start])
            for j in range(start, stop):
                s, z = scale[group[j]], zero[group[j]]
                code = nearest_codes(wanted[j - start], s, z, grid.low, grid.high)
                found[j] = code
                error[j].sub_(code.sub_(z).mul_(s))
                wanted[j - start + 1 :].addr_(handed_on[j, j + 1 : stop], error[j])
        codes[rows, place] = found.T
    return codes


def check_moment(moment: Tensor, columns: int) -> None:
    """Raise ValueError unless `moment` is (columns, columns), finite, and not zero."""
    if moment.shape != (columns, columns):
        raise ValueError(
            f"moment is {tuple(moment.shape)}: expected ({columns}, {columns}), the layer's input "
            "features squared"
        )
    level = float(moment.diagonal().mean())
    if level <= 0 or not bool(torch.isfinite(moment).all()):
        raise ValueError(
            f"moment has a mean diagonal of {level}: expected E[x x^T], finite and not zero"
        )


def _feedback(moment: Tensor, place: Tensor) -> Tensor:
    """T_ij / T_jj of the damped moment, with its rows and columns taken in the order `place`."""
    # Cholesky gives a lower triangle; reversing both axes before and after makes it an upper one.
    backwards = place.flip(0).to(moment.device)
    matrix = moment[backwards.unsqueeze(1), backwards]
    try:
        lower = cholesky_(matrix, DAMPING * float(matrix.diagonal().double().mean()))
    except ValueError:
        raise ValueError(
            "moment is not positive semi-definite, not even with its damping: expected E[x x^T]"
        ) from None
    return lower.div_(lower.diagonal().clone()).flip(0, 1)
