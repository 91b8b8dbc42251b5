"""quantize: a dense weight in, one of the stored forms out."""

from __future__ import annotations

import torch
from torch import Tensor

from libortho.base.error_feedback import check_moment, error_feedback
from libortho.base.grid import choose_grid
from libortho.base.streams import BaseStream, HalfBase, Int4Base, Int8Base
from libortho.config import BaseConfig
from libortho.kernels import reference


def quantize(
    weight: Tensor, config: BaseConfig | None = None, moment: Tensor | None = None
) -> BaseStream:
    """Store a dense weight.

    The base must not know the secret. `weight` is to be W - ortho and `moment` a statistic of
    retain data: what is stored is then a function of these two alone, with error feedback as with
    nearest rounding. (Fed back are the errors of rounding W - ortho, never W.)

    Args:
        weight: (out_features, in_features), any floating dtype, finite.
        config: how; INT8 with absmax row scales by default.
        moment: (in_features, in_features), E[x x^T] of the layer's inputs on retain data. Error
            feedback needs it; with scale="search" its diagonal weighs the errors. Not read
            where `config.reads_moment` is False.

    Raises:
        ValueError: a group size that does not divide in_features, an odd in_features with int4,
            a value beyond FP16's range with storage="fp16", rounding="error_feedback" without a
            moment, or a moment that is none (see `error_feedback`).
    """
    config = config or BaseConfig()
    if config.storage == "fp16":
        return _half(weight)
    if not config.reads_moment:
        moment = None
    if moment is not None:
        check_moment(moment, weight.shape[1])
    rounding = config.rounding
    if rounding is None:
        feeds_back = config.storage == "int4" and moment is not None
        rounding = "error_feedback" if feeds_back else "nearest"
    grid = choose_grid(weight, config, None if moment is None else moment.diagonal())
    if rounding == "nearest":
        codes = grid.nearest(weight)
    elif moment is None:
        raise ValueError(
            "rounding='error_feedback' needs the second moment of the layer's inputs, which this "
            "method does not have: expected moment=, or rounding='nearest'"
        )
    else:
        codes = error_feedback(weight, grid, moment)
    if grid.zero is None:
        return Int8Base(codes, grid.scale)
    return Int4Base(reference.pack_int4(codes), grid.scale, grid.zero)


def _half(weight: Tensor) -> HalfBase:
    limit = torch.finfo(torch.float16).max
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest > limit:
        raise ValueError(
            f"storage='fp16': the largest |weight| is {largest:.6g}, FP16 ends at {limit:.6g}; "
            "use storage='int8'"
        )
    return HalfBase(weight.to(torch.float16))
