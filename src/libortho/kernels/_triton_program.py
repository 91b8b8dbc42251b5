"""The Triton program behind `kernels.triton`; apart from it because importing it needs Triton.

Names in capitals are compile-time constants, as Triton has it.
"""

# mypy: ignore-errors
# ruff: noqa: N803 (Triton's constants are upper case)

import triton
import triton.language as tl


@triton.jit
def _block(
    q_ptr, scale_ptr, zero_ptr, n, k, n_ok, k_ok, in_features, groups, group,
    STORAGE: tl.constexpr, ROW_SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows `n` (BLOCK_N,) by columns `k` (BLOCK_K,) of W as numbers of DTYPE."""
    inside = n_ok[:, None] & k_ok[None, :]
    if STORAGE == 2:
        at = n[:, None].to(tl.int64) * (in_features // 2) + k[None, :] // 2
        byte = tl.load(q_ptr + at, mask=inside, other=0).to(tl.int32)
        codes = ((byte >> ((k[None, :] % 2) * 4)) & 15).to(tl.float32)
    else:
        at = n[:, None].to(tl.int64) * in_features + k[None, :]
        codes = tl.load(q_ptr + at, mask=inside, other=0).to(tl.float32)
    if STORAGE == 0 or ROW_SCALE:
        return codes.to(DTYPE)
    grouped = n[:, None] * groups + k[None, :] // group
    scale = tl.load(scale_ptr + grouped, mask=inside, other=0).to(tl.float32)
    if STORAGE == 2:
        codes -= tl.load(zero_ptr + grouped, mask=inside, other=0).to(tl.float32) / 16
    return (codes * scale).to(DTYPE)


@triton.jit
def split_linear(
    x_ptr, q_ptr, scale_ptr, zero_ptr, bias_ptr, first_ptr, second_ptr, third_ptr, alpha_ptr, y_ptr,
    rows, out_features, in_features, groups, group, share,
    STORAGE: tl.constexpr, KIND: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROW_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = x W^T + alpha * x O^T + bias for one tile.

    x (rows, in_features), y (rows, out_features), contiguous. The ortho tensors are left and right
    (KIND 1), or crow, col and values (KIND 2). `share` rows of x share a value of alpha. WIDE has
    half-precision numbers multiplied as fp32, which changes no product.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok = m < rows
    n_ok = n < out_features
    dtype = x_ptr.dtype.element_ty
    # TF32 would round x and W to ten bits where the reference keeps fp32.
    precision: tl.constexpr = "ieee"
    base = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    r = tl.arange(0, BLOCK_R)
    inner = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < in_features
        x_at = m[:, None].to(tl.int64) * in_features + k[None, :]
        x = tl.load(x_ptr + x_at, mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        w = _block(
            q_ptr, scale_ptr, zero_ptr, n, k, n_ok, k_ok, in_features, groups, group,
            STORAGE, ROW_SCALE, dtype,
        )  # fmt: skip
        if WIDE:
            x, w = x.to(tl.float32), w.to(tl.float32)
        base = tl.dot(x, tl.trans(w), base, input_precision=precision)
        if KIND == 1:
            right_ok = (r[:, None] < RANK) & k_ok[None, :]
            right_at = r[:, None].to(tl.int64) * in_features + k[None, :]
            right = tl.load(second_ptr + right_at, mask=right_ok, other=0.0).to(x.dtype)
            inner = tl.dot(x, tl.trans(right), inner, input_precision=precision)
    if ROW_SCALE:
        base *= tl.load(scale_ptr + n, mask=n_ok, other=0.0)[None, :]
    if KIND != 0:
        ortho = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if KIND == 1:
            left_ok = n_ok[:, None] & (r[None, :] < RANK)
            left = tl.load(first_ptr + n[:, None] * RANK + r[None, :], mask=left_ok, other=0.0)
            ortho = tl.dot(inner, tl.trans(left.to(tl.float32)), ortho, input_precision=precision)
        else:
            # Entries e, e + 1, ... of every output in the tile at once, until the longest ends.
            begin = tl.load(first_ptr + n, mask=n_ok, other=0)
            end = tl.load(first_ptr + n + 1, mask=n_ok, other=0)
            longest = tl.max(end - begin, axis=0)
            for step in range(longest):
                entry = begin + step
                entry_ok = entry < end
                column = tl.load(second_ptr + entry, mask=entry_ok, other=0)
                value = tl.load(third_ptr + entry, mask=entry_ok, other=0.0).to(tl.float32)
                taken_at = m[:, None].to(tl.int64) * in_features + column[None, :]
                taken_ok = m_ok[:, None] & entry_ok[None, :]
                taken = tl.load(x_ptr + taken_at, mask=taken_ok, other=0.0).to(tl.float32)
                ortho += taken * value[None, :]
        alpha = tl.load(alpha_ptr + m // share, mask=m_ok, other=0.0)
        # A row at alpha 0 is the base's, even where its ortho term overflowed.
        base += tl.where(alpha[:, None] == 0, 0.0, ortho * alpha[:, None])
    if HAS_BIAS:
        base += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    y_at = m[:, None].to(tl.int64) * out_features + n[None, :]
    tl.store(y_ptr + y_at, base.to(dtype), mask=m_ok[:, None] & n_ok[None, :])
