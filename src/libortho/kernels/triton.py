"""The split layer in one Triton kernel: dequantise, multiply, add alpha * ortho and the bias.

One program makes a (BLOCK_M rows, BLOCK_N outputs) tile of y. It walks along the columns, widens
codes in registers, and multiplies on the tensor cores. Low-rank factors join the same walk: each
block of x is in registers anyway, so that `x right^T` costs `rank` more columns. CSR has no such
regularity: after the walk a program goes through its outputs' entries, row of S by row, with x
gathered from the cache. alpha, one value for each row of x, multiplies the ortho part in registers.

Not measured on a GPU: there was none. It is tested under Triton's interpreter
(TRITON_INTERPRET=1), which runs the same program on a CPU, against `kernels.reference`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_FP16, _INT8, _INT4 = 0, 1, 2
_NONE, _LOW_RANK, _SPARSE = 0, 1, 2
_STORAGES = {torch.float16: _FP16, torch.int8: _INT8, torch.uint8: _INT4}


@functools.cache
def available() -> bool:
    """True where Triton is installed (PyTorch's GPU builds bring it)."""
    return importlib.util.find_spec("triton") is not None


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    ortho: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
) -> Tensor:
    """As `reference.linear`; no gradients flow. x in fp16, bf16 or fp32 (other dtypes: reference).

    Sums are in fp32. Where x is half precision, so is the dequantised weight, as in the reference.
    """
    from libortho.kernels import reference
    from libortho.kernels._triton_program import split_linear

    half_or_float = (torch.float16, torch.bfloat16, torch.float32)
    if x.numel() == 0 or 0 in qdata.shape or x.dtype not in half_or_float:
        return reference.linear(x, qdata, scale, zero, bias, ortho, alpha)
    out_features, in_features = qdata.shape[0], x.shape[-1]
    flat = x.reshape(-1, in_features).contiguous()
    rows = flat.shape[0]
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    groups = 1 if scale is None else scale.shape[1]
    group = in_features // groups
    kind = {0: _NONE, 2: _LOW_RANK, 3: _SPARSE}[len(ortho)]
    rank = ortho[0].shape[1] if kind == _LOW_RANK else 0
    if (kind == _LOW_RANK and rank == 0) or (kind == _SPARSE and ortho[2].numel() == 0):
        kind = _NONE
    # Unused pointers must still be some tensor's.
    parts = [part.contiguous() for part in ortho] if kind != _NONE else []
    parts += [flat] * (3 - len(parts))
    block_m = 16 if rows <= 16 else 64
    block_n = 32 if rows <= 16 else 64
    grid = (-(-rows // block_m), -(-out_features // block_n))
    split_linear[grid](
        flat,
        qdata.contiguous(),
        flat if scale is None else scale.contiguous(),
        flat if zero is None else zero.contiguous(),
        flat if bias is None else bias.to(x.dtype).contiguous(),
        parts[0],
        parts[1],
        parts[2],
        flat if alpha is None else alpha.to(torch.float32),
        y,
        rows,
        out_features,
        in_features,
        groups,
        group,
        1 if alpha is None else rows // alpha.numel(),
        STORAGE=_STORAGES[qdata.dtype],
        KIND=kind,
        RANK=rank,
        HAS_BIAS=bias is not None,
        ROW_SCALE=scale is not None and groups == 1 and zero is None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64,
        # The interpreter multiplies bf16 numbers as if their bits were integers.
        WIDE=os.environ.get("TRITON_INTERPRET") == "1",
        BLOCK_R=max(16, 1 << (rank - 1).bit_length()) if rank else 16,
    )
    return y.reshape(*x.shape[:-1], out_features)
