"""The stored forms of the base stream: FP16 (mere storage), INT8 and INT4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from libortho.kernels import dispatch, reference
from libortho.stored import StoredModule


class BaseStream(StoredModule):
    """A dense (out_features, in_features) matrix in some stored form (see `kernels.reference`).

    Attributes:
        qdata: (out_features, in_features) int8 or fp16, or (out_features, in_features / 2) uint8.
        scale: (out_features, groups), or None where `qdata` is the weight itself.
        zero: (out_features, groups) uint8 of INT4, else None.
        int8_activations: x is rounded to INT8 too (see `set_int8_activations`).
    """

    qdata: Tensor
    scale: Tensor | None
    zero: Tensor | None
    int8_activations: bool = False

    def __init__(self, qdata: Tensor, scale: Tensor | None, zero: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self._buffers["qdata"].shape  # type: ignore[union-attr]
        return rows, columns

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        ortho: Sequence[Tensor] = (),
        alpha: Tensor | None = None,
    ) -> Tensor:
        """`x @ W.T`, and in the same kernel what a split layer adds to it.

        Args:
            x: (..., in_features) of any floating dtype.
            bias, ortho, alpha: as `kernels.reference.linear`; `ortho` is `OrthoStream.tensors`.

        Returns:
            (..., out_features) in the dtype of x.
        """
        # nn.Module's attribute lookup, three times, costs a tenth of a small layer.
        stored = self._buffers
        qdata = stored["qdata"]
        assert qdata is not None
        return dispatch.linear(
            x, qdata, stored["scale"], stored["zero"], bias, ortho, alpha, self.int8_activations
        )

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
        rows, columns = self._buffers["qdata"].shape  # type: ignore[union-attr]
        return rows, 2 * columns


def set_int8_activations(model: nn.Module, on: bool = True) -> None:
    """Round the activations of every base stream of `model` to INT8, row by row, or stop doing so.

    An option for prompts on a CPU: INT8 x INT8 is the fastest product that there is, but its
    rounding is felt where single columns of x are large. Off by default and not stored with a
    checkpoint; gradients are those of unrounded activations.

    Raises:
        ValueError: the model has no base stream, or one that is not INT8 with one scale a row.
    """
    streams = {name: m for name, m in model.named_modules() if isinstance(m, BaseStream)}
    if not streams:
        raise ValueError(f"{type(model).__name__} has no base stream: split it first")
    for name, stream in streams.items():
        if not isinstance(stream, Int8Base) or stream.scale.shape[1] != 1:
            raise ValueError(
                f"{name} is {stream}: INT8 activations need an INT8 base with one scale a row"
            )
    for stream in streams.values():
        stream.int8_activations = on
