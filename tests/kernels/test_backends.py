"""Every way to run a split layer against the reference in float64, and the choice between them."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from libortho.base import HalfBase, Int8Base, set_int8_activations
from libortho.kernels import cpu, dispatch, native, reference
from libortho.layer import OrthoLinear
from libortho.ortho import LowRankOrtho, SparseOrtho


def _cases() -> ModuleType:
    # importlib mode has no package to import a neighbour from.
    spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cases"] = module
    spec.loader.exec_module(module)
    return module


cases = _cases()


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the C++ operators are not built: python -m libortho.kernels.native")
    return request.param


@pytest.mark.parametrize(("dtype", "atol", "rtol"), cases.TOLERANCES)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), cases.SHAPES)
def test_cpu_matches_the_reference(
    backend: str, rows: int, in_features: int, out_features: int, dtype, atol: float, rtol: float
) -> None:
    x = torch.randn(rows, in_features).to(dtype)
    seen = 0
    for number, (base, ortho, alpha) in enumerate(cases.all_cases()):
        if not cases.fits(base, in_features):
            continue
        operands = cases.make(
            base, ortho, alpha, rows, in_features, out_features, bias=number % 2 == 0
        )
        y = operands(cpu.linear, x)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double(),
            cases.exact(operands, x),
            atol=atol,
            rtol=rtol,
            msg=lambda text, at=(base, ortho, alpha): f"{at}: {text}",
        )
        seen += 1
    assert seen >= 10


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 15, 16, 31, 33, 257])
def test_both_native_paths_at_any_number_of_rows(rows: int, tiles: bool) -> None:
    if not native.available():
        pytest.skip("the C++ operators are not built: python -m libortho.kernels.native")
    if tiles and not native.has_tiles():
        pytest.skip("this processor has no tiles")
    x = torch.randn(rows, 192).bfloat16()
    for base in cases.BASES:
        for ortho in ("none", "low_rank", "sparse"):
            operands = cases.make(base, ortho, "rows", rows, 192, 37, bias=False)
            y = native.split_linear()(
                x, operands.qdata, operands.scale, operands.zero, None, operands.ortho,
                operands.alpha, tiles,
            )  # fmt: skip
            torch.testing.assert_close(y.double(), cases.exact(operands, x), atol=3e-2, rtol=1e-2)


# One block of sixteen rows to several times four; an odd number of columns; outputs of one group or
# of several; and x larger than what kernels take the cache for.
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [
        (7, 1100, 150),
        (32, 513, 40),
        (33, 1100, 150),
        (48, 1025, 131),
        (80, 2079, 33),
        (270, 2079, 150),
    ],
)
@pytest.mark.parametrize("alpha", cases.ALPHAS)
@pytest.mark.parametrize("way", [native.TILES, native.INT8_TILES])
def test_sparse_entries_of_every_output_and_block(
    way: int, alpha: str, rows: int, in_features: int, out_features: int
) -> None:
    """The ortho stream alone: beside a base of zeros nothing hides its error."""
    if not (native.available() and native.has_tiles()):
        pytest.skip("no C++ operators, or no tiles")
    x = torch.randn(rows, in_features).bfloat16()
    for kind in ("sparse", "sparse fp32", "all zero"):
        made = cases.make("int8", kind, alpha, rows, in_features, out_features, bias=False)
        operands = dataclasses.replace(made, qdata=torch.zeros_like(made.qdata))
        order = _shuffled_rows(operands.ortho)  # columns of a row may come in any order
        y = native.split_linear()(
            x, operands.qdata, operands.scale, None, None, order, operands.alpha, way
        )
        want = cases.exact(operands, x)
        torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("rank", [1, 3, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33, 257])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_rank_of_any_rank(rank: int, rows: int, dtype: torch.dtype) -> None:
    """The ortho stream alone, as above; tiles hold eight ranks, vectors sixteen."""
    if not native.available():
        pytest.skip("the C++ operators are not built: python -m libortho.kernels.native")
    in_features, out_features = 203, 37
    made = cases.make("int8", "none", "0", rows, in_features, out_features, bias=False)
    factors = (
        torch.randn(out_features, rank).to(dtype),
        (torch.randn(rank, in_features) / in_features**0.5).to(dtype),
    )
    operands = dataclasses.replace(
        made, qdata=torch.zeros_like(made.qdata), ortho=factors, alpha=torch.rand(rows)
    )
    x = torch.randn(rows, in_features).bfloat16()
    y = operands(cpu.linear, x)
    torch.testing.assert_close(y.double(), cases.exact(operands, x), atol=2e-4, rtol=2**-8)


def _shuffled_rows(ortho: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    crow, col, values = ortho
    order = torch.cat(
        [
            a + torch.randperm(b - a)
            for a, b in zip(crow[:-1].tolist(), crow[1:].tolist(), strict=True)
        ]
    )
    return crow, col[order].contiguous(), values[order].contiguous()


@pytest.mark.parametrize("base", ["int8", "int8 wide groups", "int4", "int4 wide groups"])
@pytest.mark.parametrize("in_features", [64, 576, 1536, 4224])
@pytest.mark.parametrize("outlier", [0.0, 30.0, 3000.0, 1e30, 1e-30])
def test_few_rows_lose_less_than_bf16_does(base: str, in_features: int, outlier: float) -> None:
    """Whatever x is like inside the kernel, the result is as good as its own rounding to bf16."""
    if not cases.fits(base, in_features) or (base == "int4 wide groups" and in_features % 128):
        pytest.skip("no such base")
    draw = torch.Generator().manual_seed(in_features)
    x = torch.randn(3, in_features, generator=draw).bfloat16()
    if outlier == 1e-30:
        x = (x.float() * outlier).bfloat16()
    elif outlier:
        x[:, 5] = outlier
    operands = cases.make(base, "none", "0", 3, in_features, 64, bias=False)
    want = cases.exact(operands, x)
    for rows in (1, 2, 3):
        y = operands(cpu.linear, x[:rows]).double()
        error = (y - want[:rows]).norm(dim=1) / want[:rows].norm(dim=1).clamp(min=1e-38)
        assert error.max() < 3e-3


@pytest.mark.parametrize("base", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_vanish(backend: str, base: str, bad: float) -> None:
    operands = cases.make(base, "none", "0", 2, 192, 33, bias=False)
    x = torch.randn(2, 192).bfloat16()
    x[1, 17] = bad
    y = operands(cpu.linear, x)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


def test_leading_dimensions_and_strides(backend: str) -> None:
    operands = cases.make("int8", "sparse", "0.3", 6, 64, 41, bias=True)
    x = torch.randn(3, 64, 2).transpose(1, 2)
    y = operands(cpu.linear, x)
    assert y.shape == (3, 2, 41)
    torch.testing.assert_close(y.double(), cases.exact(operands, x), atol=2e-5, rtol=2e-5)
    single = operands(cpu.linear, x[0, 0])
    torch.testing.assert_close(single, y[0, 0], atol=2e-5, rtol=2e-5)
    assert operands(cpu.linear, x[:0]).shape == (0, 2, 41)


def test_alpha_of_a_batch_is_shared_by_its_positions(backend: str) -> None:
    # Two requests of five positions each: flat rows 0 to 4 and 5 to 9.
    operands = cases.make("int8", "low_rank", "1", 10, 64, 41, bias=False)
    x = torch.randn(2, 5, 64)
    at = {a: cases.Operands(*[*_fields(operands)[:-1], torch.tensor(a)]) for a in _ALPHAS}
    both = at[(0.0, 1.0)](cpu.linear, x)
    torch.testing.assert_close(both[0], at[(0.0,)](cpu.linear, x)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1], at[(1.0,)](cpu.linear, x)[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both[0], at[(1.0,)](cpu.linear, x)[0], atol=1e-2)


_ALPHAS = [(0.0,), (1.0,), (0.0, 1.0)]


def _fields(operands) -> list:
    return [getattr(operands, name) for name in operands.__dataclass_fields__]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ortho", ["low_rank bf16", "sparse fp32"])
@pytest.mark.parametrize("rows", [2, 20, 300])
def test_what_overflows_stays_out_of_the_rows_at_alpha_0(
    backend: str, rows: int, ortho: str, dtype: torch.dtype
) -> None:
    operands = cases.make("int8", ortho, "rows", rows, 64, 41, bias=True)
    huge = tuple(
        torch.full_like(part, 3e38) if part.is_floating_point() else part for part in operands.ortho
    )
    alpha = torch.arange(rows).remainder(2).float()
    operands = dataclasses.replace(operands, ortho=huge, alpha=alpha)
    x = torch.full((rows, 64), 8.0, dtype=dtype)
    y = operands(cpu.linear, x)
    alone = dataclasses.replace(operands, ortho=(), alpha=None)(cpu.linear, x)
    torch.testing.assert_close(y[::2], alone[::2])
    assert not torch.isfinite(y[1::2]).all()


def test_not_a_number_and_infinity_pass_through(backend: str) -> None:
    operands = cases.make("int8", "none", "0", 1, 64, 8, bias=False)
    for rows in (1, 20):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 64).to(dtype)
            x[0, 3] = float("nan")
            y = operands(cpu.linear, x)
            assert y[0].isnan().all()
            assert y[1:].isfinite().all()


def test_native_refuses_what_would_read_past_an_end() -> None:
    if not native.available():
        pytest.skip("the C++ operators are not built: python -m libortho.kernels.native")
    run = native.split_linear()
    q, s, x = torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 1), torch.randn(2, 64)
    assert run(x, q, s, None, None, [], None, native.ROWS).shape == (2, 4)
    crow, col, values = torch.tensor([0, 1, 1, 1, 1]).int(), torch.zeros(1).int(), torch.ones(1)
    one = torch.ones(1)
    for arguments in (
        (x[:, :60].contiguous(), q, s, None, None, [], None, native.ROWS),
        (x, q[:, ::2], s, None, None, [], None, native.ROWS),
        (x, q, s[:3], None, None, [], None, native.ROWS),
        (x, q, torch.ones(4, 3), None, None, [], None, native.ROWS),
        (x, q.half(), s, None, None, [], None, native.ROWS),
        (x, q, s, None, torch.ones(3), [], None, native.ROWS),
        (x, q, s, None, None, [torch.ones(4, 2), torch.ones(3, 64)], one, native.ROWS),
        (x, q, s, None, None, [crow[:4], col, values], one, native.ROWS),
        (x, q, s, None, None, [crow.long(), col, values], one, native.ROWS),
        (x, q, s, None, None, [crow, col, values], None, native.ROWS),
        (x, q, s, None, None, [crow, col, values], torch.ones(3), native.ROWS),
        (x.double(), q, s, None, None, [], None, native.ROWS),
        (x, q, s, None, None, [], None, native.TILES),
        (x, q, s, None, None, [], None, native.INT8_TILES),
        (x, q, s, None, None, [], None, 3),
    ):
        with pytest.raises(RuntimeError):
            run(*arguments)


# -- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ortho", ["none", "low_rank", "sparse"])
def test_gradients_flow_to_x(ortho: str) -> None:
    operands = cases.make("int8", ortho, "0.3", 3, 64, 41, bias=True)
    x = torch.randn(3, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(operands(dispatch.linear, x).sum(), x)
    weight = cases.exact(operands, torch.eye(64)) - operands.bias.double()
    torch.testing.assert_close(grad.double(), weight.sum(1).expand(3, -1), atol=1e-4, rtol=1e-4)


def test_inference_takes_the_fast_path_and_training_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(cpu, "linear", lambda x, *rest: taken.append("cpu") or x)
    monkeypatch.setattr(reference, "linear", lambda x, *rest: taken.append("reference") or x)
    operands = cases.make("int8", "none", "0", 3, 64, 41, bias=False)
    x = torch.randn(3, 64, requires_grad=True)
    operands(dispatch.linear, x)
    operands(dispatch.linear, x.detach())
    with torch.no_grad():
        operands(dispatch.linear, x)
    with torch.inference_mode():
        operands(dispatch.linear, x)
    assert taken == ["reference", "cpu", "cpu", "cpu"]
    operands.to("meta")(dispatch.linear, x.detach().to("meta"))
    assert taken[-1] == "reference"


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3, (0.0, 1.0, 0.5)])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_layer_is_its_dense_matrix(alpha, sparse: bool) -> None:
    from libortho import alpha_scope

    operands = cases.make("int8", "sparse" if sparse else "low_rank", "1", 3, 64, 41, bias=True)
    base = Int8Base(operands.qdata, operands.scale)
    ortho = SparseOrtho(*operands.ortho, base.shape) if sparse else LowRankOrtho(*operands.ortho)
    layer = OrthoLinear.from_streams(base, ortho, operands.bias)
    x = torch.randn(3, 5, 64)
    with alpha_scope(layer, alpha), torch.no_grad():
        y = layer(x)
    values = alpha if isinstance(alpha, tuple) else (alpha,) * 3
    for row, value in enumerate(values):
        weight = layer.effective_weight(value, torch.float64)
        want = x[row].double() @ weight.T + operands.bias.double()
        torch.testing.assert_close(y[row].double(), want, atol=2e-5, rtol=2e-5)


def test_an_alpha_used_in_inference_serves_training_later() -> None:
    from libortho import set_alpha

    operands = cases.make("int8", "low_rank", "1", 3, 64, 41, bias=False)
    layer = OrthoLinear.from_streams(
        Int8Base(operands.qdata, operands.scale), LowRankOrtho(*operands.ortho)
    )
    set_alpha(layer, 0.625)
    with torch.inference_mode():
        layer(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_compiled_without_a_break_at_any_number_of_rows() -> None:
    operands = cases.make("int8", "low_rank", "0.3", 4, 64, 41, bias=True)

    def run(x: Tensor) -> Tensor:
        return operands(dispatch.linear, x * 2)

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, backend=keep, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 40):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), run(x))
    assert len(graphs) == 1


# -- INT8 activations ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [(1, 64, 32), (9, 7, 41), (40, 192, 33), (300, 1100, 50)],
)
def test_int8_activations_match_their_definition(
    backend: str, rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, in_features).to(dtype)
    for ortho in ("none", "low_rank", "sparse"):
        operands = cases.make("int8", ortho, "rows", rows, in_features, out_features, bias=True)
        arguments = (x, operands.qdata, operands.scale, operands.bias, operands.ortho)
        want = reference.linear_int8_activations(*arguments, operands.alpha)
        got = cpu.linear_int8_activations(*arguments, operands.alpha)
        # The reference rounds the base, the term and their sum to bf16, tiles only the sum.
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        # Its error is that of eight bits on x: small, and not nothing.
        error = (want.double() - cases.exact(operands, x)).norm() / want.double().norm()
        assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("rows", [1, 20])
def test_int8_activations_keep_not_a_number(backend: str, rows: int) -> None:
    operands = cases.make("int8", "none", "0", 1, 64, 8, bias=False)
    x = torch.randn(rows, 64).bfloat16()
    for bad in (float("nan"), float("inf")):
        x[0, 3] = bad
        y = cpu.linear_int8_activations(x, operands.qdata, operands.scale)
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()


def test_rows_of_zeros_quantise_to_zeros() -> None:
    codes, steps = reference.quantize_rows(torch.zeros(2, 5))
    assert not codes.any()
    assert steps.isfinite().all()


def test_int8_activations_are_chosen_for_a_whole_model() -> None:
    operands = cases.make("int8", "none", "0", 1, 64, 41, bias=False)
    layer = OrthoLinear.from_streams(Int8Base(operands.qdata, operands.scale), None)
    model = torch.nn.Sequential(layer)
    x = torch.randn(3, 64)
    plain = model(x)
    set_int8_activations(model)
    rounded = model(x)
    want = reference.linear_int8_activations(x, operands.qdata, operands.scale)
    torch.testing.assert_close(rounded, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, rounded, atol=1e-6)
    set_int8_activations(model, False)
    torch.testing.assert_close(model(x), plain)


def test_int8_activations_refuse_other_bases() -> None:
    with pytest.raises(ValueError, match="no base stream"):
        set_int8_activations(torch.nn.Linear(2, 2))
    half = OrthoLinear.from_streams(HalfBase(torch.zeros(2, 2).half()), None)
    grouped = OrthoLinear.from_streams(
        Int8Base(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 2)), None
    )
    for layer in (half, grouped):
        with pytest.raises(ValueError, match="one scale a row"):
            set_int8_activations(layer)


def test_inputs_that_are_not_contiguous(backend: str) -> None:
    wide = torch.randn(2, 4, 256).bfloat16()
    for strided in (wide[..., ::2], wide[:, ::2, :128], wide[..., :128].transpose(0, 1)):
        assert not strided.is_contiguous()
        operands = cases.make("int8", "low_rank", "1", 8, 128, 24, bias=True)
        expected = operands(cpu.linear, strided.contiguous())
        assert torch.equal(operands(cpu.linear, strided), expected)


@pytest.mark.parametrize("in_features", [1, 2, 3, 17])
def test_int8_activations_of_few_columns(backend: str, in_features: int) -> None:
    x = torch.randn(5, in_features).bfloat16()
    qdata = torch.randint(-127, 128, (7, in_features), dtype=torch.int8)
    scale = torch.rand(7, 1) / 64
    expected = reference.linear_int8_activations(x, qdata, scale)
    found = cpu.linear_int8_activations(x, qdata, scale)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
