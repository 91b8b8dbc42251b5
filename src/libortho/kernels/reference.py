"""What each stream computes, in plain PyTorch: the definition that fast paths are tested against.

All weights are constants here: gradients flow to `x` only. Each product is an
`autograd.Function` so that backward holds on to the *stored* weight (int8, fp16, factors) and
never to a dequantised copy, and works through the weight in blocks of rows so that no temporary
exceeds `BLOCK_BYTES` (plus the result itself).

Shapes: `x: (..., in_features)`, result `(..., out_features)` in the dtype of `x`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20
"""Upper bound, in bytes, of the dequantised block that a product holds at one time."""


def row_blocks(rows: int, columns: int, element_size: int) -> Iterator[slice]:
    """Slices of `rows` whose (slice, columns) block takes at most `BLOCK_BYTES` (or is one row)."""
    step = max(1, BLOCK_BYTES // max(1, columns * element_size))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dequantize_rows(qdata: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A block of stored rows as numbers of `dtype`.

    Args:
        qdata: (rows, in_features), int8 or floating.
        scale: (rows, groups) fp32, groups dividing in_features; None where `qdata` is the weight.
        dtype: the floating dtype of the result.
    """
    if scale is None:
        return qdata.to(dtype)
    rows, columns = qdata.shape
    # The product is taken in fp32 even for a bf16 result: one rounding, not two. (So a block's
    # bytes are counted at no less than four an element.)
    grouped = qdata.reshape(rows, scale.shape[1], -1).float() * scale.unsqueeze(-1)
    return grouped.reshape(rows, columns).to(dtype)


def _block(
    qdata: Tensor, scale: Tensor | None, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Some rows as a matrix of `dtype`, and the factor (rows,) that its products still lack.

    In bf16, a scale that a whole row shares is taken out of the product: int8 is exact there, so
    nothing is rounded before the sum, and one multiplication an output is cheaper than one a
    weight. (In fp16 a sum of numbers up to 127 would overflow.)
    """
    if scale is not None and scale.shape[1] == 1 and dtype == torch.bfloat16:
        return qdata[rows].to(dtype), scale[rows, 0]
    return dequantize_rows(qdata[rows], None if scale is None else scale[rows], dtype), None


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, qdata: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(qdata, scale)
        out_features, in_features = qdata.shape
        y = x.new_empty(*x.shape[:-1], out_features)
        for rows in row_blocks(out_features, in_features, max(4, x.element_size())):
            matrix, factor = _block(qdata, scale, rows, x.dtype)
            part = x @ matrix.T
            y[..., rows] = part if factor is None else part * factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        qdata, scale = ctx.saved_tensors
        out_features, in_features = qdata.shape
        grad_x = grad.new_zeros(*grad.shape[:-1], in_features)
        for rows in row_blocks(out_features, in_features, max(4, grad.element_size())):
            matrix, factor = _block(qdata, scale, rows, grad.dtype)
            part = grad[..., rows]
            grad_x += (part if factor is None else (part * factor).to(matrix.dtype)) @ matrix
        return grad_x, None, None


def dense_linear(x: Tensor, qdata: Tensor, scale: Tensor | None = None) -> Tensor:
    """`x @ W.T` for a stored dense W = qdata * scale.

    Args:
        x: (..., in_features), any floating dtype.
        qdata: (out_features, in_features), int8 with a scale, or fp16/bf16/fp32 without.
        scale: (out_features, groups) fp32 or None.
    """
    result: Tensor = _DenseLinear.apply(x, qdata, scale)
    return result


class _CsrLinear(torch.autograd.Function):
    # torch.sparse has no half-precision product on every device, so both passes run in at least
    # fp32; the ortho stream is small enough that this costs little.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(crow, col, values)
        ctx.shape = shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        matrix = csr_tensor(crow, col, values.to(dtype), shape)
        flat = x.reshape(-1, shape[1]).to(dtype)
        y: Tensor = (matrix @ flat.T).T.to(x.dtype)
        return y.reshape(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        crow, col, values = ctx.saved_tensors
        out_features, in_features = ctx.shape
        dtype = torch.promote_types(grad.dtype, torch.float32)
        transposed = torch.sparse_coo_tensor(
            torch.stack((col.long(), csr_rows(crow))),
            values.to(dtype),
            (in_features, out_features),
            check_invariants=False,
        )
        flat = grad.reshape(-1, out_features).to(dtype)
        grad_x = torch.sparse.mm(transposed, flat.T).T.to(grad.dtype)
        return grad_x.reshape(*grad.shape[:-1], in_features), None, None, None, None


def csr_tensor(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The (out_features, in_features) `torch.sparse_csr` view of the three stored arrays."""
    with warnings.catch_warnings():
        # torch says once per process that its CSR layout is in beta; a user can do nothing with it.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def csr_rows(crow: Tensor) -> Tensor:
    """Row index of every stored entry, (nnz,) int64, from the (rows + 1,) row pointer."""
    counts = crow.diff().long()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=crow.device), counts)


def csr_linear(
    x: Tensor, crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]
) -> Tensor:
    """`x @ S.T` for a sparse S in CSR.

    Args:
        x: (..., in_features), any floating dtype.
        crow: (out_features + 1,) int32, start of each row in `col` and `values`.
        col: (nnz,) int32.
        values: (nnz,) floating.
        shape: (out_features, in_features) of S.
    """
    result: Tensor = _CsrLinear.apply(x, crow, col, values, shape)
    return result


def low_rank_linear(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x @ (left @ right).T` for factors left (out_features, k) and right (k, in_features).

    Computed in the dtype of `x`; the factors are small, so plain autograd serves.
    """
    return (x @ right.T.to(x.dtype)) @ left.T.to(x.dtype)
