"""Truncated SVD, Cholesky factors in little memory, and the precision of products."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WIDE = 8192
"""Most columns that are factored in fp64: two fp64 copies take 1 GiB there."""

_PRECISION = threading.Lock()
"""Held while the precision of products is another one: it is the process's, not a thread's."""

RESIDUAL = 1e-3
"""Relative error of L L^T v, for a random v, above which a factor in fp32 counts as failed."""


@contextmanager
def matmul_precision(*factors: Tensor) -> Iterator[None]:
    """Multiply fp32 copies of `factors` in bf16 units where that loses nothing.

    Numbers that came as bf16 multiply exactly there and add up in fp32, at twice fp32's speed.
    """
    exact = all(factor.dtype == torch.bfloat16 for factor in factors)
    with _PRECISION:
        restore = _set_precision(exact)
        try:
            yield
        finally:
            restore()


def _set_precision(fast: bool) -> Callable[[], None]:
    """Have fp32 products in bf16 units, or in fp32; returns what takes that back."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has set a backend's own precision, which torch 2.9 brought
        backends: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
        held = [backend.fp32_precision for backend in backends]
        fastest = ("bf16", "tf32") if fast else ("ieee", "ieee")

        def put(values: Sequence[str]) -> None:
            for backend, value in zip(backends, values, strict=True):
                backend.fp32_precision = value

        put(fastest)
        return functools.partial(put, held)
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    return functools.partial(torch.set_float32_matmul_precision, before)


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Draws within the block depend on `seed` alone; the caller's random states stay as they are.

    Args:
        seed: any integer.
        devices: that are drawn on, beside the CPU; a CUDA device has its index.
    """
    used = sorted({d.index for d in devices if d.type == "cuda"})
    with torch.random.fork_rng(used):
        # not `torch.manual_seed`, which seeds every CUDA device there is
        torch.default_generator.manual_seed(seed % 2**63)
        for index in used:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed % 2**63)
        yield


def cholesky_(matrix: Tensor, shift: float) -> Tensor:
    """L with L L^T = matrix + shift * I, in a memory that large matrices can afford.

    Up to `WIDE` columns in fp64. Beyond, in fp32 and in the matrix's own memory: no second one is
    held. Entry by entry, L L^T is then right to a few roundings of sqrt(M_ii M_jj), columns of
    very different size included (Higham 2002, Accuracy and Stability of Numerical Algorithms,
    theorem 10.3), and the factorisation cannot fail while the condition number is well below
    1 / eps; a `shift` of r times the mean diagonal bounds that by columns / r. The result is held
    against the matrix on a random vector.

    Args:
        matrix: (d, d) fp32, symmetric, positive semi-definite. Not to be used afterwards.
        shift: >= 0.

    Returns:
        (d, d) lower triangular, fp64 up to `WIDE` columns and fp32 beyond.

    Raises:
        ValueError: the matrix is not positive definite, or so nearly singular that fp32 fails.
    """
    width = len(matrix)
    if width <= WIDE:
        matrix = matrix.double()
    matrix.diagonal().add_(shift)
    probe = torch.ones(width, 1, dtype=matrix.dtype, device=matrix.device)
    probe[::2] = -1
    expected = matrix @ probe
    # LAPACK works in place on columns; of a symmetric matrix, rows will do for columns.
    columns = matrix.T
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(columns, out=(columns, info))
    error = float((factor @ (factor.T @ probe) - expected).norm() / expected.norm())
    if int(failed) or not error <= RESIDUAL:
        raise ValueError(
            f"a {width} x {width} matrix is not positive definite in {matrix.dtype} (column "
            f"{int(failed)}, residual {error:.1e}): expected a larger ridge"
        )
    return factor


def low_rank_part(weight: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` approximation of a matrix in the Frobenius norm (Eckart-Young).

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix, and projecting
    W on the leading ones (or taking the trailing ones away, whichever are fewer) is the truncated
    SVD: no singular vector of the longer side is ever formed. Squaring the condition number is
    harmless here, because only the *span* is used and an error in it costs the gap between the
    singular values that it confuses.

    Args:
        weight: (m, n), fp32 or fp64.
        rank: 1 <= rank <= min(m, n); at min(m, n) the weight itself is returned (a copy).

    Returns:
        (m, n) in the dtype of `weight`.
    """
    short = min(weight.shape)
    _check_rank(rank, weight)
    if rank == short:
        return weight.clone()
    tall = weight if weight.shape[0] <= weight.shape[1] else weight.T
    _, vectors = torch.linalg.eigh(tall @ tall.T)
    if rank <= short // 2:
        basis = vectors[:, short - rank :]
        part = basis @ (basis.T @ tall)
    else:
        basis = vectors[:, : short - rank]
        # No third matrix of the weight's size: the product is added where the copy lies.
        part = torch.addmm(tall, basis, basis.T @ tall, alpha=-1)
    return part if tall is weight else part.T.contiguous()


def randomized_low_rank_part(weight: Tensor, rank: int, *, seed: int = 0) -> Tensor:
    """A near-best rank-`rank` approximation by random projection with power iterations.

    Halko, Martinsson, Tropp (2011), algorithm 5.1 over 4.4, as in `torch.svd_lowrank`; 10 extra
    columns and 4 power iterations. The caller's random state is left alone.

    Args and returns: as `low_rank_part`.
    """
    _check_rank(rank, weight)
    if rank == min(weight.shape):
        return weight.clone()
    with seeded(seed):
        columns = min(rank + 10, *weight.shape)
        u, s, v = torch.svd_lowrank(weight, q=columns, niter=4)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].T


def leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-`rank` approximation as two factors, with its singular values.

    As in `low_rank_part`, from the Gram matrix of the shorter side: its eigenvectors are one
    factor, orthonormal, and the matrix projected on them is the other.

    Args:
        matrix: (m, n), fp32 or fp64.
        rank: 1 <= rank <= min(m, n).

    Returns:
        left (m, rank), right (rank, n) and singular values (rank,), descending; the leading k
        columns of `left` times the leading k rows of `right` are the best rank-k approximation.
    """
    _check_rank(rank, matrix)
    if matrix.shape[0] > matrix.shape[1]:
        right, left, values = leading_factors(matrix.T, rank)
        return left.T, right.T, values
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors[:, -rank:].flip(1)
    right = left.T @ matrix
    return left, right, right.norm(dim=1)


def _check_rank(rank: int, weight: Tensor) -> None:
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank={rank} for a {tuple(weight.shape)} matrix: expected 1 to {min(weight.shape)}"
        )
