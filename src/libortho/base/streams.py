"""The stored forms of the base stream: FP16 (mere storage) and INT8 (per row or per group)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from libortho.config import BaseConfig
from libortho.kernels import reference

INT8_MAX = 127


class BaseStream(nn.Module):
    """A dense (out_features, in_features) matrix in some stored form.

    Attributes:
        qdata: (out_features, in_features), int8 or fp16.
        scale: (out_features, groups) fp32, or None where `qdata` is the weight itself.
    """

    qdata: Tensor
    scale: Tensor | None

    def __init__(self, qdata: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.qdata.shape[0], self.qdata.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.qdata.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T`; x (..., in_features) of any floating dtype -> (..., out_features)."""
        return reference.dense_linear(x, self.qdata, self.scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (out_features, in_features) matrix as numbers of `dtype`."""
        return reference.dequantize_rows(self.qdata, self.scale, dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # model.half() / .to(bfloat16) are about activations and parameters. What is stored here was
        # rounded once, on purpose; casting the scales or the fp16 data would change the weights.
        qdata, scale = self.qdata, self.scale
        super()._apply(fn, recurse)
        if self.qdata.dtype != qdata.dtype:
            self.qdata = qdata.to(self.qdata.device)
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self


class HalfBase(BaseStream):
    """FP16 storage."""

    def __init__(self, qdata: Tensor) -> None:
        super().__init__(qdata, None)

    def extra_repr(self) -> str:
        return f"fp16, shape={self.shape}"


class Int8Base(BaseStream):
    """INT8 storage, W = qdata * scale, one fp32 scale a row or a group of columns."""

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        super().__init__(qdata, scale)

    def extra_repr(self) -> str:
        groups = 0 if self.scale is None else self.scale.shape[1]
        return f"int8, shape={self.shape}, groups={groups}"


def quantize(weight: Tensor, config: BaseConfig | None = None) -> BaseStream:
    """Store a dense weight.

    Args:
        weight: (out_features, in_features), any floating dtype, finite.
        config: how; INT8 with absmax row scales by default.

    Raises:
        ValueError: a group size that does not divide in_features, or a value beyond FP16's range
            with storage="fp16".
    """
    config = config or BaseConfig()
    if config.storage == "fp16":
        limit = torch.finfo(torch.float16).max
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if largest > limit:
            raise ValueError(
                f"storage='fp16': the largest |weight| is {largest:.6g}, FP16 ends at {limit:.6g}; "
                "use storage='int8'"
            )
        return HalfBase(weight.to(torch.float16))
    scale = _int8_scale(weight, config)
    qdata = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in reference.row_blocks(weight.shape[0], weight.shape[1], 4):
        block = weight[rows].float().reshape(-1, scale.shape[1], weight.shape[1] // scale.shape[1])
        block = (block / scale[rows].unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
        qdata[rows] = block.reshape(-1, weight.shape[1]).to(torch.int8)
    return Int8Base(qdata, scale)


def _int8_scale(weight: Tensor, config: BaseConfig) -> Tensor:
    rows, columns = weight.shape
    group = config.group_size or columns
    if columns % group:
        raise ValueError(
            f"group_size={group} does not divide the layer's {columns} input features; "
            "use a divisor of it, or None for one scale a row"
        )
    scale = torch.empty(rows, columns // group, dtype=torch.float32, device=weight.device)
    for block in reference.row_blocks(rows, columns, 4):
        magnitude = weight[block].float().abs().reshape(-1, columns // group, group)
        if config.scale == "absmax":
            reach = magnitude.amax(dim=-1)
        else:
            # torch.quantile refuses inputs over 2**24 elements and is slower; sorting a row is
            # exact. "higher" interpolation: the smallest stored value that covers the fraction.
            rank = min(group, max(1, math.ceil(config.percentile * group)))
            reach = magnitude.kthvalue(rank, dim=-1).values
            # A sparse row can have a percentile of zero though it is not empty: its own maximum
            # then serves, since a scale of zero would lose the row.
            reach = torch.where(reach > 0, reach, magnitude.amax(dim=-1))
        # An all-zero row quantises to zeros under any scale; 1 avoids 0 / 0.
        scale[block] = torch.where(reach > 0, reach / INT8_MAX, torch.ones_like(reach))
    return scale
