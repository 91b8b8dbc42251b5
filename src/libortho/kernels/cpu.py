"""The best that a CPU has for a number of rows; results as `kernels.reference` defines them.

With the C++ operators (`kernels.native`), one call does both streams, alpha and the bias:

    up to 3 rows, 12 without AMX, 16 where x is not bf16: one pass over the stored weight, which
        memory bandwidth bounds;
    more, bf16 with tiles (AMX, or AVX-512's products of bf16): blocks of the weight widened in the
        cache and multiplied there;
    else: the reference's product in blocks for the base, and the operator for the ortho stream.

Without them PyTorch's kernels serve: `_weight_int8pack_mm` for few rows of bf16 on INT8 with one
scale a row, and the reference for everything else. (`_weight_int4pack_mm_for_cpu` cannot hold this
INT4: its zero points are bf16 numbers, ours times a scale need sixteen bits.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.kernels import native, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS_BEFORE_TILES = 3
"""Up to here one pass over the weight, row by row, is faster than AMX's tiles of sixteen rows."""
ROWS_BEFORE_VECTORS = 12
"""Up to here it is faster than the same tiles multiplied by vectors."""
ROWS_AT_ONCE = 16
"""Up to here it is faster than dequantising the weight first."""
ROWS_INT8PACK = 8
"""Up to here `_weight_int8pack_mm` is faster than dequantising and multiplying in bf16."""

_ALIGNED = 64
"""Bytes; a whole register of AVX-512."""


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    ortho: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
) -> Tensor:
    """As `reference.linear`; no gradients flow."""
    count, out_features = x.numel(), qdata.shape[0]
    if not (count and out_features):
        return reference.linear(x, qdata, scale, zero, bias, ortho, alpha)
    rows = count // x.shape[-1]
    if not (native.available() and x.dtype in _DTYPES and _stored_as_expected(qdata, scale, ortho)):
        return _with_torch(x, rows, qdata, scale, zero, bias, ortho, alpha)
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype)
    if rows <= ROWS_BEFORE_TILES:
        way = native.ROWS
    elif x.dtype == torch.bfloat16 and native.has_tiles() and _whole_tiles(x.shape[-1], scale):
        vectors = not native.has_matrix_tiles()
        way = native.ROWS if vectors and rows <= ROWS_BEFORE_VECTORS else native.TILES
    elif rows <= ROWS_AT_ONCE:
        way = native.ROWS
    else:
        y = reference.dense_linear(x, qdata, scale, zero)
        if ortho:
            native.add_ortho()(y, x, ortho, alpha)
        return y if bias is None else y + bias
    return native.split_linear()(x, qdata, scale, zero, bias, ortho, alpha, way)


def _whole_tiles(in_features: int, scale: Tensor | None) -> bool:
    """False for groups that would share a tile's 32 columns with another."""
    return scale is None or scale.shape[1] == 1 or in_features // scale.shape[1] % 32 == 0


def _stored_as_expected(qdata: Tensor, scale: Tensor | None, ortho: Sequence[Tensor]) -> bool:
    """False for what only the reference handles: other dtypes, strides, odd groups of INT4."""
    if qdata.dtype == torch.uint8:
        assert scale is not None
        if (2 * qdata.shape[1] // scale.shape[1]) % 32:
            return False
    elif qdata.dtype not in (torch.int8, torch.float16):
        return False
    if not qdata.is_contiguous():
        return False
    for part in ortho:  # a generator would cost as much as the rest
        if not part.is_contiguous():
            return False
    return not ortho or ortho[-1].dtype in _DTYPES


@functools.lru_cache(maxsize=64)
def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bfloat16)


def _with_torch(
    x: Tensor,
    rows: int,
    qdata: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    ortho: Sequence[Tensor],
    alpha: Tensor | None,
) -> Tensor:
    x = x.contiguous()
    fits = qdata.dtype == torch.int8 and scale is not None and scale.shape[1] == 1
    # torch's kernel loads both with instructions that end the process where they are not aligned,
    # and weights that are mapped from a file stand wherever its header ends. So is each of their
    # rows, which begins where the one before it ends.
    fits = fits and qdata.data_ptr() % _ALIGNED == 0 and x.data_ptr() % _ALIGNED == 0
    fits = fits and qdata.shape[1] % _ALIGNED == 0
    if not (fits and x.dtype == torch.bfloat16 and rows <= ROWS_INT8PACK):
        return reference.linear(x, qdata, scale, zero, bias, ortho, alpha)
    assert scale is not None
    # Its scales would be bf16; ours, fp32, multiply the result instead.
    y = torch._weight_int8pack_mm(x.reshape(rows, -1), qdata, _ones(qdata.shape[0]))
    y = (y * scale[:, 0]).to(x.dtype).reshape(*x.shape[:-1], -1)
    return reference.add_terms(y, x, bias, ortho, alpha)


def linear_int8_activations(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ortho: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
) -> Tensor:
    """As `reference.linear_int8_activations`; no gradients flow.

    Through INT8 tiles where there are any, else through oneDNN's INT8 product.
    """
    known = native.available() and x.dtype in _DTYPES and _stored_as_expected(qdata, scale, ortho)
    if known and x.dtype == torch.bfloat16 and native.has_tiles():
        if bias is not None:
            bias = bias.to(x.dtype)
        return native.split_linear()(
            x.contiguous(), qdata, scale, None, bias, ortho, alpha, native.INT8_TILES
        )
    if x.shape[-1] == 1:  # oneDNN's product of one column by one row is wrong (torch 2.13)
        return reference.linear_int8_activations(x, qdata, scale, bias, ortho, alpha)
    codes, steps = reference.quantize_rows(x.reshape(-1, x.shape[-1]))
    sums = torch._int_mm(codes, qdata.T)
    y = (sums * steps * scale[:, 0]).to(x.dtype).reshape(*x.shape[:-1], -1)
    if known and ortho:
        native.add_ortho()(y, x.contiguous(), ortho, alpha)
        ortho = ()
    return reference.add_terms(y, x, bias, ortho, alpha)


def add_gram_(matrix: Tensor, rows: Tensor) -> None:
    """As `reference.add_gram_`: bf16 rows through tiles, where there are any."""
    tiles = rows.dtype == torch.bfloat16 and native.available() and native.has_tiles()
    if tiles and matrix.is_contiguous():
        native.add_gram()(matrix, rows.contiguous())
    else:
        reference.add_gram_(matrix, rows)
