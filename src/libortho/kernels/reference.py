"""What each stream computes, in plain PyTorch: the definition that fast paths are tested against.

All weights are constants here: gradients flow to `x` only. Each product has a backward of its own,
which holds on to the *stored* weight (int8, fp16, factors) and never to a dequantised copy, and
works through the weight in blocks of rows so that no temporary exceeds `BLOCK_BYTES` (plus the
result itself).

Stored forms of a dense W, told apart by what stands beside `qdata`:

    fp16    qdata (out_features, in_features) floating
    int8    qdata (out_features, in_features) int8; scale (out_features, groups) fp32
            W = qdata * scale
    int4    qdata (out_features, in_features / 2) uint8, two codes 0..15 to a byte (`pack_int4`);
            scale (out_features, groups) bf16; zero (out_features, groups) uint8, in 16ths of a code
            W = (code - zero / 16) * scale, exact in fp32

A group is in_features / groups neighbouring columns.

Shapes: `x: (..., in_features)`, result `(..., out_features)` in the dtype of `x`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from libortho.linalg import matmul_precision

BLOCK_BYTES = 8 * 2**20
"""Upper bound, in bytes, of the dequantised block that a product holds at one time."""


ZERO_STEPS = 16
"""Steps of an INT4 zero point to one code."""

PANELS = 4
"""A triangle is gone through in at least so many panels: 5/8 of the operations of a whole product,
in products that are still large."""

PANEL = 1024
"""Most rows of a panel: what a product holds beside the triangle."""


def row_blocks(
    rows: int, columns: int, element_size: int, limit: int | None = None
) -> Iterator[slice]:
    """Slices of `rows` whose (slice, columns) block takes at most `limit` bytes (or is one row).

    `limit` is `BLOCK_BYTES` unless given.
    """
    step = max(1, (limit or BLOCK_BYTES) // max(1, columns * element_size))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes to a byte: columns 2j and 2j + 1 are the low and the high half of byte j.

    Args:
        codes: (rows, columns) uint8, 0..15, columns even.

    Returns:
        (rows, columns / 2) uint8.
    """
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(qdata: Tensor) -> Tensor:
    """The codes, (rows, columns) uint8, of (rows, columns / 2) packed bytes."""
    return torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(-2)


def dequantize_rows(
    qdata: Tensor, scale: Tensor | None, dtype: torch.dtype, zero: Tensor | None = None
) -> Tensor:
    """A block of stored rows as (rows, in_features) numbers of `dtype`.

    Args:
        qdata, scale, zero: rows of a stored weight; see the module's text. groups divide
            in_features.
        dtype: the floating dtype of the result.
    """
    if scale is None:
        return qdata.to(dtype)
    codes = qdata if zero is None else unpack_int4(qdata)
    # The product is taken in fp32 even for a bf16 result: one rounding, not two. (So a block's
    # bytes are counted at no less than four an element.)
    grouped = codes.reshape(codes.shape[0], scale.shape[1], -1).float()
    if zero is not None:
        grouped = grouped - (zero.float() / ZERO_STEPS).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).reshape(codes.shape).to(dtype)


def _block(
    qdata: Tensor, scale: Tensor | None, zero: Tensor | None, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Some rows as a matrix of `dtype`, and the factor (rows,) that its products still lack.

    In bf16, a scale that a whole row of int8 shares is taken out of the product: int8 is exact
    there, so nothing is rounded before the sum, and one multiplication an output is cheaper than
    one a weight. (In fp16 a sum of numbers up to 127 would overflow.)
    """
    part = qdata[rows]
    if scale is None:
        return dequantize_rows(part, None, dtype), None
    if zero is not None:
        return dequantize_rows(part, scale[rows], dtype, zero[rows]), None
    if scale.shape[1] == 1 and dtype == torch.bfloat16:
        return part.to(dtype), scale[rows, 0]
    return dequantize_rows(part, scale[rows], dtype), None


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qdata: Tensor, scale: Tensor | None, zero: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(qdata, scale, zero)
        out_features, in_features = qdata.shape[0], x.shape[-1]
        y = x.new_empty(*x.shape[:-1], out_features)
        for rows in row_blocks(out_features, in_features, max(4, x.element_size())):
            matrix, factor = _block(qdata, scale, zero, rows, x.dtype)
            part = x @ matrix.T
            y[..., rows] = part if factor is None else part * factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        qdata, scale, zero = ctx.saved_tensors
        out_features = qdata.shape[0]
        in_features = qdata.shape[1] * (1 if zero is None else 2)
        grad_x = grad.new_zeros(*grad.shape[:-1], in_features)
        for rows in row_blocks(out_features, in_features, max(4, grad.element_size())):
            matrix, factor = _block(qdata, scale, zero, rows, grad.dtype)
            part = grad[..., rows]
            grad_x += (part if factor is None else (part * factor).to(matrix.dtype)) @ matrix
        return grad_x, None, None, None


def dense_linear(
    x: Tensor, qdata: Tensor, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """`x @ W.T` for a stored dense W.

    Args:
        x: (..., in_features), any floating dtype.
        qdata, scale, zero: the stored weight; see the module's text.
    """
    result: Tensor = _DenseLinear.apply(x, qdata, scale, zero)
    return result


# torch.sparse has no half-precision product on every device, so both passes run in at least fp32;
# the ortho stream is small enough that this costs little. They are operators of their own, and not
# one autograd.Function like the dense product, because torch.compile cannot look into sparse
# layouts: it calls an operator as it is. autocast would have them in half precision all the same.


@torch.library.custom_op("libortho::csr_linear", mutates_args=())
def _csr_linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, out_features: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    matrix = csr_tensor(crow, col, values.to(dtype), (out_features, x.shape[-1]))
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = (matrix @ flat.T).T.to(x.dtype).contiguous()
    return y.reshape(*x.shape[:-1], out_features)


@_csr_linear.register_fake
def _(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("libortho::csr_linear_backward", mutates_args=())
def _csr_linear_backward(
    grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int
) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    transposed = torch.sparse_coo_tensor(
        torch.stack((col.long(), csr_rows(crow))),
        values.to(dtype),
        (in_features, grad.shape[-1]),
        check_invariants=False,
    )
    flat = grad.reshape(-1, grad.shape[-1]).to(dtype)
    with torch.autocast(grad.device.type, enabled=False):
        grad_x = torch.sparse.mm(transposed, flat.T).T.to(grad.dtype).contiguous()
    return grad_x.reshape(*grad.shape[:-1], in_features)


@_csr_linear_backward.register_fake
def _(grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _csr_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, crow, col, values, _ = inputs
    ctx.save_for_backward(crow, col, values)
    ctx.in_features = x.shape[-1]


def _csr_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _csr_linear_backward(grad, *ctx.saved_tensors, ctx.in_features), None, None, None, None


_csr_linear.register_autograd(_csr_backward, setup_context=_csr_setup)


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
    return _csr_linear(x, crow, col, values, shape[0])


def low_rank_linear(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x @ (left @ right).T` for factors left (out_features, k) and right (k, in_features).

    Computed in the dtype of `x`; the factors are small, so plain autograd serves.
    """
    return (x @ right.T.to(x.dtype)) @ left.T.to(x.dtype)


def ortho_linear(x: Tensor, ortho: Sequence[Tensor]) -> Tensor:
    """`x @ O.T` for an ortho stream by its tensors: (left, right), or (crow, col, values).

    Args:
        x: (..., in_features).
        ortho: as `low_rank_linear` or `csr_linear` takes them.
    """
    if len(ortho) == 2:
        return low_rank_linear(x, *ortho)
    crow, col, values = ortho
    return csr_linear(x, crow, col, values, (crow.numel() - 1, x.shape[-1]))


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    ortho: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
) -> Tensor:
    """`base(x) + alpha * ortho(x) + bias`: a split layer, and the signature of every backend.

    Args:
        x: (..., in_features), any floating dtype.
        qdata, scale, zero: the stored base; see the module's text.
        bias: (out_features,) or None.
        ortho: as `ortho_linear`; empty for none.
        alpha: (n,) fp32 (fp64 for x in fp64) where there is an ortho stream. n divides the rows
            of x, counted over all leading dimensions; each value serves equally many of them.

    Returns:
        (..., out_features) in the dtype of x.
    """
    return add_terms(dense_linear(x, qdata, scale, zero), x, bias, ortho, alpha)


def add_terms(
    y: Tensor, x: Tensor, bias: Tensor | None, ortho: Sequence[Tensor], alpha: Tensor | None
) -> Tensor:
    """`y + alpha * ortho(x) + bias`, the part of `linear` after the base."""
    if ortho:
        assert alpha is not None
        term = ortho_linear(x, ortho)
        factor = alpha.to(torch.promote_types(x.dtype, torch.float32))
        factor = factor.repeat_interleave(x.shape[:-1].numel() // alpha.numel())
        factor = factor.reshape(*x.shape[:-1], 1)
        both = y + (term * factor).to(y.dtype)
        # A row at alpha 0 is the base's, even where the term of a half-precision x overflowed.
        y = torch.where(factor == 0, y, both) if alpha.numel() > 1 else both
    return y if bias is None else y + bias.to(y.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (rows, columns) as INT8 codes and the step (rows, 1) fp32 between them."""
    wide = x.float()
    steps = wide.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide * steps.reciprocal()).round_().to(torch.int8), steps


def linear_int8_activations(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ortho: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
) -> Tensor:
    """`linear` for INT8 weights with one scale a row, the base's x rounded to INT8 row by row.

    The sums are exact integers; the ortho stream sees x unrounded. The error is that of eight bits
    on x, which outliers among a row's columns make large: an option, not the default.
    """
    codes, steps = quantize_rows(x.reshape(-1, x.shape[-1]))
    sums = codes.double() @ qdata.double().T
    y = (sums * steps * scale[:, 0]).to(x.dtype).reshape(*x.shape[:-1], -1)
    return add_terms(y, x, bias, ortho, alpha)


def triangle_panels(width: int) -> list[tuple[int, int]]:
    """Ranges of rows in which the lower triangle of a (width, width) matrix is gone through."""
    step = min(PANEL, max(128, -(-width // PANELS)))
    return [(low, min(low + step, width)) for low in range(0, width, step)]


def add_gram_(matrix: Tensor, rows: Tensor) -> None:
    """matrix += rows^T rows, in the lower triangle; above it the matrix means nothing.

    Args:
        matrix: (d, d) fp32.
        rows: (n, d), any floating dtype.
    """
    # Transposed first: both factors are then read along their rows, which is a third faster.
    wide = rows.T.contiguous().float()
    with matmul_precision(rows):
        for low, high in triangle_panels(len(matrix)):
            matrix[low:high, :high].addmm_(wide[low:high], wide[:high].T)
