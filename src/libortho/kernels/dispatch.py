"""The one place that chooses a kernel, by device, dtype, rows and whether gradients are wanted.

Every backend has the signatures of `kernels.reference` and is tested against it. Gradients come
from the reference, whose backward holds no dequantised copy; what fast paths save, they save in
inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.kernels import cpu, reference, triton


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    ortho: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """`reference.linear`, by the fastest kernel that there is for these arguments.

    Args:
        int8_activations: where True, x is rounded to INT8 row by row on the CPU
            (`reference.linear_int8_activations`); INT8 weights with one scale a row only. Not for
            gradients, which are those of unrounded activations.
        Others: as `reference.linear`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.linear(x, qdata, scale, zero, bias, ortho, alpha)
    if int8_activations and x.device.type == "cpu" and x.numel():
        assert scale is not None
        return cpu.linear_int8_activations(x, qdata, scale, bias, ortho, alpha)
    if torch.compiler.is_compiling():
        return _opaque(x, qdata, scale, zero, bias, list(ortho), alpha)
    return _fastest(x, qdata, scale, zero, bias, ortho, alpha)


def add_gram_(matrix: Tensor, rows: Tensor) -> None:
    """`reference.add_gram_`, by the fastest kernel that there is for these arguments."""
    if rows.device.type == "cpu":
        cpu.add_gram_(matrix, rows)
    else:
        reference.add_gram_(matrix, rows)


def _fastest(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    ortho: Sequence[Tensor],
    alpha: Tensor | None,
) -> Tensor:
    if x.device.type == "cpu":
        return cpu.linear(x, qdata, scale, zero, bias, ortho, alpha)
    if x.device.type == "cuda" and triton.available():
        return triton.linear(x, qdata, scale, zero, bias, ortho, alpha)
    return reference.linear(x, qdata, scale, zero, bias, ortho, alpha)


# In a compiled graph the choice is made when the graph runs: rows are often symbols while tracing.
@torch.library.custom_op("libortho::linear", mutates_args=())
def _opaque(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    ortho: Sequence[Tensor],
    alpha: Tensor | None,
) -> Tensor:
    return _fastest(x, qdata, scale, zero, bias, ortho, alpha)


@_opaque.register_fake
def _(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    ortho: Sequence[Tensor],
    alpha: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qdata.shape[0])
