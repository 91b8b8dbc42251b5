"""Truncated SVD against torch.linalg.svd in float64, and Cholesky factors in either precision."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libortho import linalg
from libortho.linalg import (
    cholesky_,
    leading_factors,
    low_rank_part,
    matmul_precision,
    randomized_low_rank_part,
    seeded,
)

SHAPES = [(41, 9), (9, 41), (20, 20)]


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_svd(shape: tuple[int, int], rank: int, dtype: torch.dtype, atol: float) -> None:
    # Singular values 2^0 ... 2^-n: the gap is what the eigenvectors of the Gram matrix rest on.
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    weight = ((u * 2.0 ** -torch.arange(min(shape))) @ v).to(dtype)
    part = low_rank_part(weight, rank)
    assert part.dtype == dtype
    assert part.shape == shape
    torch.testing.assert_close(part.double(), truncated(weight, rank), atol=atol, rtol=0)


@given(
    rows=st.integers(1, 24), columns=st.integers(1, 24), share=st.floats(0, 1), seed=st.integers(0)
)
def test_is_the_best_approximation(rows: int, columns: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    weight = torch.randn(rows, columns, generator=generator)
    rank = max(1, round(share * min(rows, columns)))
    singular = torch.linalg.svdvals(weight.double())
    best = singular[rank:].square().sum().sqrt()
    error = (low_rank_part(weight, rank).double() - weight.double()).norm()
    assert error <= best + 1e-5 * singular[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_a_copy(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    for function in (low_rank_part, randomized_low_rank_part):
        part = function(weight, min(shape))
        assert torch.equal(part, weight)
        assert part.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_leading_factors(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    left, right, values = leading_factors(weight, rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    torch.testing.assert_close(values, torch.linalg.svdvals(weight)[:rank])
    for k in range(rank + 1):
        torch.testing.assert_close(left[:, :k] @ right[:k], truncated(weight, k))


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("shape", [(60, 30), (30, 60), (40, 40)])
def test_randomised_is_close(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape)
    best = (truncated(weight, rank) - weight).norm()
    part = randomized_low_rank_part(weight, rank)
    assert part.shape == shape
    assert (part - weight).norm() <= 1.02 * best
    assert torch.linalg.matrix_rank(part.double(), rtol=1e-5) == rank


def test_randomised_depends_on_its_seed_alone() -> None:
    weight = torch.randn(60, 60)
    torch.manual_seed(1)
    first = randomized_low_rank_part(weight, 5, seed=7)
    torch.manual_seed(2)
    assert torch.equal(randomized_low_rank_part(weight, 5, seed=7), first)
    assert not torch.equal(randomized_low_rank_part(weight, 5, seed=8), first)


@pytest.mark.parametrize("function", [low_rank_part, randomized_low_rank_part, leading_factors])
def test_leaves_the_random_state_and_the_argument_alone(function) -> None:
    weight = torch.randn(12, 30)
    copy, state = weight.clone(), torch.get_rng_state()
    function(weight, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("function", [low_rank_part, randomized_low_rank_part, leading_factors])
@pytest.mark.parametrize("rank", [-1, 0, 5])
def test_rank_out_of_range(function, rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank} .*\(4, 9\).* 1 to 4"):
        function(torch.randn(4, 9), rank)


def spread_out(width: int, spread: float, sink: float) -> Tensor:
    """A moment whose columns differ by `spread`, and a first position that is far larger."""
    x = torch.randn(3 * width, width) * torch.logspace(0, -spread, width)
    x[0, : width // 8] = sink
    return x.T @ x / len(x)


@pytest.mark.parametrize(("spread", "sink"), [(0.0, 0.0), (3.0, 0.0), (3.0, 1e4)])
@pytest.mark.parametrize("wide", [False, True])
def test_cholesky(monkeypatch, wide: bool, spread: float, sink: float) -> None:
    width = 300
    monkeypatch.setattr(linalg, "WIDE", width - 1 if wide else width)
    moment = spread_out(width, spread, sink)
    shift = 0.1 * float(moment.diagonal().mean())
    expected = moment.double() + shift * torch.eye(width).double()
    held = moment.clone()
    factor = cholesky_(held, shift)
    assert factor.dtype == (torch.float32 if wide else torch.float64)
    assert (factor.data_ptr() == held.data_ptr()) == wide  # in the matrix's own memory
    assert torch.equal(held, moment) != wide
    assert torch.equal(factor, factor.tril())
    root = expected.diagonal().sqrt()
    error = (factor.double() @ factor.double().T - expected).abs() / torch.outer(root, root)
    assert float(error.max()) < (1e-5 if wide else 1e-7)
    # What the factor is for: whitened directions, beside those of float64.
    exact = torch.linalg.cholesky(expected)
    rows = torch.randn(4, width, dtype=torch.float64)
    mine = torch.linalg.solve_triangular(factor.double(), rows.T, upper=False)
    theirs = torch.linalg.solve_triangular(exact, rows.T, upper=False)
    assert float((mine - theirs).norm()) < 2e-3 * float(theirs.norm())


@pytest.mark.parametrize("wide", [False, True])
def test_cholesky_of_what_has_none(monkeypatch, wide: bool) -> None:
    monkeypatch.setattr(linalg, "WIDE", 5 if wide else 8192)
    with pytest.raises(ValueError, match=r"6 x 6 .* not positive definite .*ridge"):
        cholesky_(-torch.eye(6), 0.0)


def test_cholesky_checks_its_residual(monkeypatch) -> None:
    monkeypatch.setattr(linalg, "RESIDUAL", 0.0)
    with pytest.raises(ValueError, match="residual"):
        cholesky_(spread_out(64, 3.0, 0.0), 1e-3)


# -- the process's settings --------------------------------------------------------


def test_precision_of_products_beside_a_backends_own() -> None:
    """A caller who has set one of torch's newer settings finds it as it was."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought these settings")
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with matmul_precision(torch.ones(1, dtype=torch.bfloat16)):
            assert matmul.fp32_precision == "bf16"
        assert matmul.fp32_precision == "tf32"
        with matmul_precision(torch.ones(1)):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_precision_of_products_in_two_threads() -> None:
    before = torch.get_float32_matmul_precision()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with matmul_precision(torch.ones(1, dtype=torch.bfloat16)):
            inside.set()
            leave.wait(5)

    def ask() -> None:
        with matmul_precision(torch.ones(1)):
            seen.append(torch.get_float32_matmul_precision())

    seen: list[str] = []
    threads = [threading.Thread(target=hold), threading.Thread(target=ask)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    threads[1].join(0.1)
    leave.set()
    for thread in threads:
        thread.join(5)
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == before


def test_seeded_draws_leave_the_callers_state_alone() -> None:
    state = torch.get_rng_state()
    with seeded(7, torch.device("cpu")):
        first = torch.rand(3)
    with seeded(7):
        assert torch.equal(torch.rand(3), first)
    with seeded(8):
        assert not torch.equal(torch.rand(3), first)
    with seeded(-1):  # any integer
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)
