"""Sums of x x^T against float64, however they are held."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libortho import gram as module
from libortho.gram import Gram
from libortho.kernels import reference

CPU = torch.device("cpu")


def exact(parts: list[Tensor], width: int) -> Tensor:
    rows = torch.cat([torch.zeros(0, width, dtype=torch.float64), *(p.double() for p in parts)])
    return rows.T @ rows


def assert_sum(found: Gram, expected: Tensor) -> None:
    """Entry by entry to a few roundings of sqrt(M_ii M_jj), and symmetric to the bit."""
    root = expected.diagonal().sqrt()
    torch.testing.assert_close(found.diagonal().double(), expected.diagonal(), rtol=1e-5, atol=1e-9)
    dense = found.dense()
    assert torch.equal(dense, dense.T)
    bound = 1e-5 * torch.outer(root, root) + 1e-9
    assert bool(((dense.double() - expected).abs() <= bound).all())


@given(
    width=st.sampled_from([1, 7, 41, 300]),
    lengths=st.lists(st.integers(0, 50), max_size=8),
    chunk=st.sampled_from([3, 16, 2048]),
    seed=st.integers(0, 99),
)
def test_equals_float64(width: int, lengths: list[int], chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, width, generator=generator) for n in lengths]
    parts = [p.bfloat16() if i % 2 else p for i, p in enumerate(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(reference, "PANEL", 64)
        found = Gram(width, CPU)
        for part in parts:
            found.add(part)
        expected = exact(parts, width)
        rows = found.rows
        if rows is not None:
            assert len(rows) == sum(lengths) <= width // 2
            torch.testing.assert_close(rows.double().T @ rows.double(), expected)
        assert_sum(found, expected)
        # The matrix grows on after it was looked at, and so does a copy through a pickle.
        found.add(parts[0] if parts else torch.ones(1, width))
        again = pickle.loads(pickle.dumps(found))
        assert_sum(again, expected + exact(parts[:1] if parts else [torch.ones(1, width)], width))


@pytest.mark.parametrize("mine", [3, 40])
@pytest.mark.parametrize("others", [2, 50])
def test_sums_add_and_scale(monkeypatch, mine: int, others: int) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)  # 3 and 2 rows of 14 stay rows, 40 and 50 do not
    first, second = torch.randn(mine, 14), torch.randn(others, 14)
    one, other = Gram(14, CPU), Gram(14, CPU)
    one.add(first)
    one.scale_(0.25)
    other.add(second)
    one.add_(other)
    assert_sum(one, 0.25 * exact([first], 14) + exact([second], 14))


def test_few_rows_stay_rows_until_they_are_many(monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    found = Gram(20, CPU)
    assert found.rows is not None
    assert found.rows.shape == (0, 20)
    found.add(torch.ones(9, 20))
    assert found.rows is not None
    found.add(torch.ones(2, 20))
    assert found.rows is None
    assert torch.equal(found.dense(), torch.full((20, 20), 11.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dense", [False, True])
def test_diagonal_tells_of_what_is_not_finite(bad: float, dense: bool) -> None:
    found = Gram(5, CPU)
    found.add(torch.tensor([[1.0, 2.0, bad, 0.0, 0.0]]))
    if dense:
        found.dense()
    assert torch.isfinite(found.diagonal()).tolist() == [True, True, False, True, True]


def test_many_tokens_keep_fp32_accuracy() -> None:
    # bf16 rows: products are exact, so that only the sum rounds; a bf16 sum would be off by 1 %.
    rows = torch.randn(20_000, 40).bfloat16()
    rows[:, 0] += 30  # and a column that is far larger
    found = Gram(40, CPU)
    for part in rows.split(700):
        found.add(part)
    assert_sum(found, exact([rows], 40))
