"""The kernels against float64 formulas written out here, and their bound on memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from libortho.kernels import reference

# (dtype, atol, rtol): inputs and weights are of order 1, sums of a few dozen terms.
TOLERANCES = [
    (torch.float64, 1e-12, 1e-12),
    (torch.float32, 2e-5, 1e-5),
    (torch.bfloat16, 8e-2, 2e-2),
    (torch.float16, 1e-2, 3e-3),
]
# (rows of x, in_features, out_features)
SHAPES = [(9, 7, 41), (1, 1, 1), (3, 41, 7), (5, 64, 1), (2, 1, 33), (4, 130, 67)]
LEADING = [(), (0,), (3, 0), (2, 3, 4)]


class Case:
    """A stored weight and what it stands for in float64."""

    def __init__(self, kind: str, out_features: int, in_features: int, groups: int = 1) -> None:
        draw = torch.Generator().manual_seed(out_features * 1000 + in_features)
        if kind == "int4":
            in_features += in_features % 2  # two to a byte: an odd width does not exist
        shape = (out_features, in_features)
        self.kind, self.shape = kind, shape
        self.zero = None
        if kind == "int8":
            self.qdata = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
            # Scales of ten bits: qdata * scale is exact in fp32, so fp64 can be tested tightly.
            self.scale = torch.randint(1, 1024, (out_features, groups), generator=draw) / 2.0**17
            wide = self.scale.double().repeat_interleave(in_features // groups, dim=1)
            self.exact = self.qdata.double() * wide
        elif kind == "int4":
            codes = torch.randint(0, 16, shape, generator=draw)
            self.qdata = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
            self.scale = (torch.rand(out_features, groups, generator=draw) / 4 + 1e-3).bfloat16()
            self.zero = torch.randint(0, 241, (out_features, groups), generator=draw).byte()
            scale, zero = (
                part.double().repeat_interleave(in_features // groups, dim=1)
                for part in (self.scale, self.zero)
            )
            self.exact = (codes - zero / 16) * scale
        elif kind == "fp16":
            self.qdata = torch.randn(shape, generator=draw).half()
            self.scale = None
            self.exact = self.qdata.double()
        elif kind == "csr":
            mask = torch.rand(shape, generator=draw) < 0.3
            if out_features > 1:
                mask[::2] = False  # empty rows, the first among them
            self.load(torch.randn(shape, generator=draw).half().double() * mask)
        else:
            rank = 3
            self.left = torch.randn(out_features, rank, generator=draw).half()
            self.right = torch.randn(rank, in_features, generator=draw).half()
            self.exact = self.left.double() @ self.right.double()

    def load(self, dense: Tensor) -> Case:
        self.exact, self.shape = dense, tuple(dense.shape)
        row, col = dense.nonzero(as_tuple=True)
        ends = (dense != 0).sum(dim=1).cumsum(0)
        self.crow = torch.cat((torch.zeros(1), ends)).int()
        self.col = col.int()
        self.values = dense[row, col].half()
        return self

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "csr":
            return reference.csr_linear(x, self.crow, self.col, self.values, self.shape)
        if self.kind == "low_rank":
            return reference.low_rank_linear(x, self.left, self.right)
        return reference.dense_linear(x, self.qdata, self.scale, self.zero)


KINDS = ["int8", "int4", "fp16", "csr", "low_rank"]


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient(
    kind: str, rows: int, in_features: int, out_features: int, dtype, atol: float, rtol: float
) -> None:
    case = Case(kind, out_features, in_features)
    x = torch.randn(rows, case.shape[1]).to(dtype).requires_grad_()
    seen = torch.randn(rows, out_features).to(dtype)
    y = case(x)
    y.backward(seen)
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(
        y.detach().double(), x.detach().double() @ case.exact.T, atol=atol, rtol=rtol
    )
    torch.testing.assert_close(
        x.grad.double(), seen.double() @ case.exact, atol=2 * atol, rtol=2 * rtol
    )


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions(kind: str, leading: tuple[int, ...]) -> None:
    case = Case(kind, 41, 7)
    x = torch.randn(*leading, case.shape[1], dtype=torch.float64, requires_grad=True)
    y = case(x)
    assert y.shape == (*leading, 41)
    torch.testing.assert_close(y, x @ case.exact.T)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, case.exact.sum(0).expand(*leading, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_input(kind: str) -> None:
    case = Case(kind, 5, 6)
    x = torch.randn(6, 4, dtype=torch.float64).T.requires_grad_()
    y = case(x)
    torch.testing.assert_close(y, x @ case.exact.T)
    # A sum's gradient is an expanded scalar: no memory of its own.
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, case.exact.sum(0).expand(4, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    case = Case(kind, 4, 6)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(case, (x,))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("groups", [1, 2, 4, 6, 12])
def test_groups_of_columns(kind: str, groups: int) -> None:
    case = Case(kind, 5, 12, groups)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(case(x), x @ case.exact.T, atol=1e-12, rtol=1e-12)


@given(rows=st.integers(0, 9), half=st.integers(0, 9), seed=st.integers(0, 2**16))
def test_packing_round_trip(rows: int, half: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * half), generator=draw, dtype=torch.uint8)
    packed = reference.pack_int4(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, half))
    assert torch.equal(reference.unpack_int4(packed), codes)


def test_packing_order() -> None:
    # The order on disk: the low half of a byte is the column to the left.
    assert reference.pack_int4(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [
        [0x21, 0x0F]
    ]


def test_int4_is_exact_in_fp32() -> None:
    case = Case("int4", 41, 130, 13)
    found = reference.dequantize_rows(case.qdata, case.scale, torch.float32, case.zero)
    assert torch.equal(found.double(), case.exact)


def test_bf16_weight_is_rounded_once() -> None:
    # In bf16 the scale alone rounds to 1, and 100.3 to 100.5.
    qdata, scale = torch.tensor([[100]], dtype=torch.int8), torch.tensor([[1.003]])
    once = torch.tensor(100 * 1.003).bfloat16()
    twice = 100 * scale.bfloat16().item()
    assert float(once) != twice
    assert reference.dequantize_rows(qdata, scale, torch.bfloat16).item() == float(once)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_stored(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 7).to(dtype).requires_grad_()
    empty_csr = Case("csr", 5, 7).load(torch.zeros(5, 7))
    assert empty_csr.values.numel() == 0
    for y in (
        empty_csr(x),
        reference.low_rank_linear(x, torch.zeros(5, 0), torch.zeros(0, 7)),
        reference.dense_linear(x, torch.zeros(5, 7, dtype=torch.int8), torch.ones(5, 1)),
    ):
        assert y.dtype == dtype
        assert torch.equal(y, torch.zeros(2, 3, 5, dtype=dtype))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))


def test_csr_rows() -> None:
    crow = torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)
    assert reference.csr_rows(crow).tolist() == [1, 1, 3]


def test_row_blocks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 100)
    blocks = list(reference.row_blocks(11, 6, 4))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(11))
    assert all((block.stop - block.start) * 6 * 4 <= 100 for block in blocks)
    assert max(block.stop - block.start for block in blocks) == 4
    # A row wider than the bound cannot be cut, and is taken alone.
    assert [b.stop - b.start for b in reference.row_blocks(3, 1000, 4)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp16"])
def test_dequantised_blocks_are_bounded(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    case = Case(kind, 41, 7)
    sizes: list[int] = []
    rows: list[int] = []
    original = reference._block

    def recording(*arguments: object) -> tuple[Tensor, Tensor | None]:
        block, factor = original(*arguments)
        sizes.append(block.nbytes)
        rows.append(block.shape[0])
        return block, factor

    monkeypatch.setattr(reference, "BLOCK_BYTES", 256)
    monkeypatch.setattr(reference, "_block", recording)
    x = torch.randn(9, case.shape[1]).to(dtype).requires_grad_()
    y = case(x)
    assert sum(rows) == 41
    assert len(rows) > 1
    rows.clear()
    y.sum().backward()
    assert sum(rows) == 41
    assert len(rows) > 1
    assert max(sizes) <= 256


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in storages:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp16"])
def test_temporaries_are_bounded(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    # One row of x: the results are small and every large tensor is a temporary.
    case = Case(kind, 200, 100)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 4096)
    x = torch.randn(1, 100).to(dtype).requires_grad_()
    with _Largest() as largest:
        y = case(x)
        forward = largest.nbytes
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert 0 < forward <= 4096
    assert largest.nbytes <= 4096


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_saves_the_stored_weight_only(kind: str) -> None:
    case = Case(kind, 41, 8)
    x = torch.randn(9, 8, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case(x)
    stored = [t for t in (case.qdata, case.scale, case.zero) if t is not None]
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in stored}


def test_a_row_at_alpha_0_is_the_base_alone() -> None:
    """Beside a row at alpha 1, and though its own term overflows in half precision."""
    qdata, left, right = torch.randn(5, 8).half(), torch.full((5, 1), 6e4), torch.ones(1, 8)
    x = torch.full((2, 8), 100.0).half()
    found = reference.linear(x, qdata, ortho=(left, right), alpha=torch.tensor([0.0, 1.0]))
    assert torch.equal(found[0], reference.linear(x, qdata)[0])
    assert found[1].isinf().all()


def test_csr_under_autocast() -> None:
    """Which would run it in bf16, where there is no sparse product."""
    dense = torch.randn(6, 9) * (torch.rand(6, 9) > 0.5)
    csr = dense.to_sparse_csr()
    crow, col = csr.crow_indices().int(), csr.col_indices().int()
    x = torch.randn(4, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = reference.csr_linear(x, crow, col, csr.values(), (6, 9))
        y.sum().backward()
    torch.testing.assert_close(y, x @ dense.T)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(4, 9))
