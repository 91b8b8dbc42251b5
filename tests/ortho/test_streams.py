"""The ortho stream: what is kept comes back exactly, in balanced factors or in CSR."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from libortho.ortho import LowRankOrtho, OrthoStream, SparseOrtho


def sparse() -> SparseOrtho:
    return SparseOrtho.from_dense(torch.randn(9, 7), torch.rand(9, 7) < 0.3, torch.float16)


def low_rank() -> LowRankOrtho:
    return LowRankOrtho.from_factors(torch.randn(9, 3), torch.randn(3, 7), torch.float16)


both = pytest.mark.parametrize("make", [sparse, low_rank])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_dense_keeps_exactly_the_masked_entries(dtype: torch.dtype) -> None:
    matrix, mask = torch.randn(9, 7), torch.rand(9, 7) < 0.3
    mask[4] = False
    mask[0, 0] = True
    matrix[0, 0] = 0.0  # an entry that is kept though it is zero
    ortho = SparseOrtho.from_dense(matrix, mask, dtype)
    assert ortho.numel == int(mask.sum())
    assert ortho.values.dtype == dtype
    assert ortho.crow.dtype == ortho.col.dtype == torch.int32
    assert torch.equal(ortho.dense(), torch.where(mask, matrix.to(dtype).float(), 0.0))
    for row in range(9):
        start, end = ortho.crow[row].item(), ortho.crow[row + 1].item()
        assert ortho.col[start:end].tolist() == mask[row].nonzero().flatten().tolist()


def test_from_dense_of_nothing() -> None:
    ortho = SparseOrtho.from_dense(torch.randn(3, 4), torch.zeros(3, 4, dtype=bool), torch.float16)
    assert ortho.numel == 0
    assert (ortho.dense() == 0).all()
    assert (ortho(torch.randn(2, 4)) == 0).all()


def test_from_factors_keeps_the_product() -> None:
    left = torch.randn(9, 3, dtype=torch.float64)
    right = torch.randn(3, 7, dtype=torch.float64)
    ortho = LowRankOrtho.from_factors(left, right, torch.float32)
    torch.testing.assert_close(ortho.dense(torch.float64), left @ right, atol=1e-6, rtol=1e-6)
    assert ortho.rank == 3
    assert ortho.numel == 9 * 3 + 3 * 7
    assert ortho.nbytes == 4 * ortho.numel


def test_from_factors_balances_each_direction() -> None:
    # Without balance the first overflows fp16 and the second vanishes in it.
    left = torch.randn(9, 3) * torch.tensor([1e9, 1e-9, 1.0])
    right = torch.randn(3, 7) * torch.tensor([1e-9, 1e9, 1.0]).unsqueeze(1)
    ortho = LowRankOrtho.from_factors(left, right, torch.float16)
    torch.testing.assert_close(
        ortho.left.float().norm(dim=0), ortho.right.float().norm(dim=1), rtol=2e-3, atol=0
    )
    expected = left.double() @ right.double()
    torch.testing.assert_close(ortho.dense(torch.float64), expected, rtol=1e-2, atol=1e-2)


def test_from_factors_with_dead_directions() -> None:
    left, right = torch.randn(4, 3), torch.randn(3, 5)
    left[:, 0] = 0
    right[1] = 0
    ortho = LowRankOrtho.from_factors(left, right, torch.float32)
    assert torch.isfinite(ortho.left).all()
    assert torch.isfinite(ortho.right).all()
    torch.testing.assert_close(ortho.dense(), left @ right)


def test_from_factors_of_rank_zero() -> None:
    ortho = LowRankOrtho.from_factors(torch.zeros(4, 0), torch.zeros(0, 5), torch.float16)
    assert (ortho.rank, ortho.numel, ortho.shape) == (0, 0, (4, 5))
    assert torch.equal(ortho(torch.randn(2, 5)), torch.zeros(2, 4))
    assert torch.equal(ortho.dense(), torch.zeros(4, 5))


def test_from_factors_beyond_the_dtype() -> None:
    left, right = torch.full((2, 1), 1e6), torch.full((1, 2), 1e6)
    with pytest.raises(ValueError, match=r"float16.*float32"):
        LowRankOrtho.from_factors(left, right, torch.float16)
    LowRankOrtho.from_factors(left, right, torch.float32)


def test_factors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(2, 5\)"):
        LowRankOrtho(torch.zeros(4, 3), torch.zeros(2, 5))


@both
def test_forward(make) -> None:
    ortho = make()
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(ortho(x), x @ ortho.dense(torch.float64).T)


@both
def test_state_dict_round_trip(make) -> None:
    ortho: OrthoStream = make()
    other = copy.deepcopy(ortho)
    for buffer in other.buffers():
        buffer.zero_()
    assert not any(buffer.any() for buffer in other.buffers())
    other.load_state_dict(ortho.state_dict())
    assert torch.equal(other.dense(), ortho.dense())
    assert ortho.nbytes == sum(t.nbytes for t in ortho.state_dict().values())


@both
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_cast_of_the_model_leaves_the_data_alone(make, cast: str) -> None:
    ortho = make()
    before: dict[str, Tensor] = copy.deepcopy(ortho.state_dict())
    getattr(nn.Sequential(ortho), cast)()
    for name, tensor in ortho.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_a_value_beyond_the_range_of_its_dtype_is_refused() -> None:
    matrix = torch.full((3, 4), 1e5)
    mask = torch.eye(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"float16.*store it as float32"):
        SparseOrtho.from_dense(matrix, mask, torch.float16)
    assert SparseOrtho.from_dense(matrix, mask, torch.float32).numel == 3
