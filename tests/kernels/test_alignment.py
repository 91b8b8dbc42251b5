"""Operands that stand anywhere in memory, as those that are mapped from a file do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libortho import BaseConfig
from libortho.base import quantize
from libortho.kernels import cpu, native, reference


def moved(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy that begins so many elements after a multiple of 64 bytes."""
    size = tensor.element_size()
    room = torch.empty(tensor.numel() + 64 // size + offset, dtype=tensor.dtype)
    start = -room.data_ptr() % 64 // size + offset
    there = room[start : start + tensor.numel()].view(tensor.shape)
    there.copy_(tensor)
    assert there.data_ptr() % 64 == offset * size % 64
    return there


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 40])
@pytest.mark.parametrize("storage", ["int8", "int4", "fp16"])
def test_any_alignment(rows: int, storage, compiled: bool, monkeypatch) -> None:
    if compiled and not native.available():
        pytest.skip("the C++ operators are not built")
    monkeypatch.setattr(native, "available", lambda: compiled)
    base = quantize(torch.randn(32, 64), BaseConfig(storage=storage))
    x = torch.randn(rows, 64).bfloat16()
    expected = reference.linear(x, base.qdata, base.scale, base.zero)
    for weight_offset, x_offset in ((0, 0), (1, 0), (8, 0), (0, 1), (0, 4), (3, 7)):
        qdata = moved(base.qdata, weight_offset)
        found = cpu.linear(moved(x, x_offset), qdata, base.scale, base.zero)
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("columns", [24, 40, 48, 72])
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_rows_that_begin_anywhere(rows: int, columns: int, monkeypatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    base = quantize(torch.randn(32, columns), BaseConfig())
    x = torch.randn(rows, columns).bfloat16()
    found = cpu.linear(x, base.qdata, base.scale, base.zero)
    expected = reference.linear(x, base.qdata, base.scale, base.zero)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
