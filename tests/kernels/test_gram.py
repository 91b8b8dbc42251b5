"""Sums of x x^T through tiles against float64, and the choice of who computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libortho.kernels import cpu, dispatch, native, reference


@pytest.fixture
def tiles() -> None:
    if not (native.available() and native.has_tiles()):
        pytest.skip("needs the C++ operators and a processor with tiles")


def assert_lower(found: Tensor, before: Tensor, rows: Tensor) -> None:
    """Entry by entry to a few roundings of sqrt(M_ii M_jj)."""
    exact = before.double() + rows.double().T @ rows.double()
    size = (before.abs().double() + rows.double().square().sum(dim=0)).diagonal().sqrt()
    error = (found.double() - exact).tril().abs()
    assert bool((error <= 2e-6 * torch.outer(size, size) + 1e-30).all()), error.max()


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 257, 1100])
@pytest.mark.parametrize("width", [1, 16, 31, 32, 33, 64, 97, 300])
def test_tiles_equal_float64(tiles: None, count: int, width: int) -> None:
    rows = torch.randn(count, width).bfloat16()
    rows[:, 0] += 30  # a column far larger than the others
    matrix = torch.randn(width, width)
    matrix = matrix @ matrix.T
    found = matrix.clone()
    cpu.add_gram_(found, rows)
    assert_lower(found, matrix, rows)
    assert not torch.equal(found.tril(), matrix.tril())
    cpu.add_gram_(found, rows[: count // 2])
    assert_lower(found, matrix, torch.cat([rows, rows[: count // 2]]))


def test_more_strips_than_the_cache_is_given(tiles: None) -> None:
    rows = torch.randn(70, 1000).bfloat16()
    found = torch.zeros(1000, 1000)
    cpu.add_gram_(found, rows)
    assert_lower(found, torch.zeros(1000, 1000), rows)


def test_what_is_not_finite_stays_in_its_row_and_column(tiles: None) -> None:
    rows = torch.randn(50, 70).bfloat16()
    rows[17, 40] = float("nan")
    found = torch.zeros(70, 70)
    cpu.add_gram_(found, rows)
    lower = torch.ones(70, 70).tril().bool()
    bad = torch.zeros(70, 70).bool()
    bad[40], bad[:, 40] = True, True
    assert torch.equal(~torch.isfinite(found) & lower, bad & lower)


def test_any_number_of_threads_gives_the_same_bits(tiles: None) -> None:
    rows = torch.randn(300, 500).bfloat16()
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(torch.zeros(500, 500))
            cpu.add_gram_(sums[-1], rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums[0].tril(), sums[1].tril())
    assert torch.equal(sums[0].tril(), sums[2].tril())


def test_bad_operands_are_refused(tiles: None) -> None:
    rows = torch.randn(4, 6).bfloat16()
    for matrix in (torch.zeros(6, 5), torch.zeros(5, 5), torch.zeros(6, 6).double()):
        with pytest.raises(RuntimeError, match="matrix is not"):
            native.add_gram()(matrix, rows)
    with pytest.raises(RuntimeError, match="rows are not"):
        native.add_gram()(torch.zeros(6, 6), rows.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("built", [True, False])
def test_every_dtype_with_and_without_the_operators(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, built: bool
) -> None:
    if not built:
        monkeypatch.setattr(native, "available", lambda: False)
    rows = torch.randn(90, 45).to(dtype)
    wide = torch.zeros(45, 90)
    for matrix in (torch.zeros(45, 45), wide[:, ::2]):  # the second is strided
        dispatch.add_gram_(matrix, rows)
        assert_lower(matrix, torch.zeros(45, 45), rows)
    assert not wide[:, 1::2].any()


def test_the_tiles_are_what_is_chosen(tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(reference, "add_gram_", never)
    dispatch.add_gram_(torch.zeros(8, 8), torch.randn(3, 8).bfloat16())
    with pytest.raises(AssertionError, match="the reference was asked"):
        dispatch.add_gram_(torch.zeros(8, 8), torch.randn(3, 8))
