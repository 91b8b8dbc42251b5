"""The stored forms of the base stream: FP16 (mere storage), INT8 and INT4."""

from __future__ import annotations

import torch
from torch import Tensor

from libortho.kernels import reference
from libortho.stored import StoredModule


class BaseStream(StoredModule):
    """A dense (out_features, in_features) matrix in some stored form (see `kernels.reference`).

    Attributes:
        qdata: (out_features, in_features) int8 or fp16, or (out_features, in_features / 2) uint8.
        scale: (out_features, groups), or None where `qdata` is the weight itself.
        zero: (out_features, groups) uint8 of INT4, else None.
    """

    qdata: Tensor
    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, qdata: Tensor, scale: Tensor | None, zero: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.qdata.shape[0], self.qdata.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T`; x (..., in_features) of any floating dtype -> (..., out_features)."""
        return reference.dense_linear(x, self.qdata, self.scale, self.zero)

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """The (out_features, in_features) matrix as numbers of `dtype`, or some of its rows."""
        scale, zero = (None if part is None else part[rows] for part in (self.scale, self.zero))
        return reference.dequantize_rows(self.qdata[rows], scale, dtype, zero)

    def extra_repr(self) -> str:
        groups = "" if self.scale is None else f", groups={self.scale.shape[1]}"
        return f"shape={self.shape}{groups}"


class HalfBase(BaseStream):
    """FP16 storage."""

    def __init__(self, qdata: Tensor) -> None:
        super().__init__(qdata, None)


class Int8Base(BaseStream):
    """INT8 storage, W = qdata * scale, one fp32 scale a row or a group of columns."""

    scale: Tensor

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        super().__init__(qdata, scale)


class Int4Base(BaseStream):
    """INT4 storage, W = (code - zero / 16) * scale; one bf16 scale and one uint8 zero a group.

    At groups of 64 columns that is 4.375 bits a weight. A zero point in 16ths of a code is as good
    as one in fp16 (to three digits of the error) at half the size; a bf16 scale has fp32's range,
    and its coarseness costs nothing, since codes are chosen for the scale as it is stored.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, qdata: Tensor, scale: Tensor, zero: Tensor) -> None:
        super().__init__(qdata, scale, zero)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.qdata.shape[0], 2 * self.qdata.shape[1])
