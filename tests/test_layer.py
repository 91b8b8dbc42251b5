"""OrthoLinear: y = base(x) + alpha * ortho(x) + bias, for every shape and dtype."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from libortho import (
    BaseConfig,
    OrthoLinear,
    OrthoStreamMissing,
    alpha_scope,
    replace_linear_layers,
    separation_report,
    set_alpha,
)
from libortho.base import quantize
from libortho.ortho import LowRankOrtho, OrthoStream, SparseOrtho

IN, OUT = 7, 41


def make(kind: str = "sparse", storage: str = "int8", bias: bool = True) -> OrthoLinear:
    """A layer whose ortho stream is as large as its base."""
    base = quantize(torch.randn(OUT, IN), BaseConfig(storage=storage))
    ortho: OrthoStream = LowRankOrtho.from_factors(
        torch.randn(OUT, 2), torch.randn(2, IN), torch.float32
    )
    if kind == "sparse":
        mask = torch.rand(OUT, IN) < 0.3
        ortho = SparseOrtho.from_dense(torch.randn(OUT, IN), mask, torch.float16)
    return OrthoLinear.from_streams(base, ortho, torch.randn(OUT) if bias else None)


def at(layer: OrthoLinear, x: Tensor, alpha: float) -> Tensor:
    with alpha_scope(layer, alpha):
        return layer(x)


def formula(layer: OrthoLinear, x: Tensor, alpha: float) -> Tensor:
    """The layer's output in float64, from its streams' dense matrices."""
    assert layer.ortho is not None
    weight = layer.base.dequantize(torch.float64) + alpha * layer.ortho.dense(torch.float64)
    y = x.double() @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


every_form = pytest.mark.parametrize(
    ("kind", "storage", "bias"),
    [
        ("sparse", "int8", True),
        ("sparse", "fp16", False),
        ("low_rank", "int8", False),
        ("low_rank", "fp16", True),
    ],
)


@every_form
@pytest.mark.parametrize("leading", [(), (9,), (2, 3), (2, 1, 3), (0,), (3, 0)])
@pytest.mark.parametrize("alpha", [0, 0.25, 1])
def test_formula(kind: str, storage: str, bias: bool, leading, alpha: float) -> None:
    layer = make(kind, storage, bias)
    set_alpha(layer, alpha)
    x = torch.randn(*leading, IN, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*leading, OUT)
    # int8 times scale is rounded to fp32 once, in the layer as in `dequantize`.
    torch.testing.assert_close(y, formula(layer, x, alpha), atol=1e-10, rtol=1e-10)


@every_form
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [(torch.float32, 2e-5, 1e-5), (torch.bfloat16, 1e-1, 2e-2), (torch.float16, 2e-2, 3e-3)],
)
def test_dtypes(kind: str, storage: str, bias: bool, dtype, atol: float, rtol: float) -> None:
    layer = make(kind, storage, bias).to(dtype)
    x = torch.randn(9, IN).to(dtype)
    for alpha in (0.0, 0.5, 1.0):
        set_alpha(layer, alpha)
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), formula(layer, x, alpha), atol=atol, rtol=rtol)


@given(
    alpha=st.floats(0, 1),
    rows=st.integers(1, 5),
    kind=st.sampled_from(["sparse", "low_rank"]),
)
def test_affine_in_alpha(alpha: float, rows: int, kind: str) -> None:
    layer = make(kind)
    x = torch.randn(rows, IN, dtype=torch.float64)
    low, high = at(layer, x, 0.0), at(layer, x, 1.0)
    torch.testing.assert_close(
        at(layer, x, alpha), low + alpha * (high - low), atol=1e-10, rtol=1e-10
    )
    assert not torch.allclose(low, high, atol=1e-3)


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
@pytest.mark.parametrize("zero", [0, 0.0, -0.0, torch.tensor(0.0), [0.0, 0, 0]])
def test_at_alpha_zero_the_ortho_stream_is_not_run(
    monkeypatch: pytest.MonkeyPatch, kind: str, zero
) -> None:
    layer = make(kind)
    x = torch.randn(3, IN)
    expected = layer(x)

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("the ortho stream was run")

    # Kernels are given the stream's tensors, so whoever runs it asks for them.
    monkeypatch.setattr(type(layer.ortho), "tensors", property(refuse))
    set_alpha(layer, zero)
    assert torch.equal(layer(x), expected)
    for other in (1e-3, [0.0, 0.0, 1.0]):
        with alpha_scope(layer, other), pytest.raises(AssertionError, match="was run"):
            layer(x)


def test_starts_at_alpha_zero() -> None:
    layer = make()
    x = torch.randn(2, IN)
    torch.testing.assert_close(layer(x).double(), formula(layer, x, 0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [IN - 1, IN + 1, 1])
def test_wrong_last_dimension(width: int) -> None:
    with pytest.raises(ValueError, match=rf"\(2, {width}\).*\(\.\.\., {IN}\)"):
        make()(torch.randn(2, width))


@every_form
def test_gradients_flow_to_the_input(kind: str, storage: str, bias: bool) -> None:
    layer = make(kind, storage, bias)
    set_alpha(layer, [0.0, 0.25, 1.0])
    x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(3, 2, OUT, dtype=torch.float64)
    (grad,) = torch.autograd.grad(layer(x), x, seen)
    base, ortho = layer.base.dequantize(torch.float64), layer.ortho.dense(torch.float64)
    for row, alpha in enumerate((0.0, 0.25, 1.0)):
        torch.testing.assert_close(grad[row], seen[row] @ (base + alpha * ortho))


@every_form
def test_effective_weight(kind: str, storage: str, bias: bool) -> None:
    layer = make(kind, storage, bias)
    for alpha in (0.0, 0.3, 1.0):
        expected = layer.base.dequantize(torch.float64) + alpha * layer.ortho.dense(torch.float64)
        torch.testing.assert_close(layer.effective_weight(alpha, torch.float64), expected)
        assert layer.effective_weight(alpha).dtype == torch.float32
    with pytest.raises(ValueError, match=r"1\.5"):
        layer.effective_weight(1.5)


# -- without an ortho stream -----------------------------------------------------


def test_base_only_layer_refuses_alpha() -> None:
    layer = OrthoLinear.from_streams(quantize(torch.randn(OUT, IN)), None)
    model = nn.Sequential(layer, OrthoLinear(nn.Linear(OUT, IN), use_low_rank=False))
    x = torch.randn(2, IN)
    torch.testing.assert_close(layer(x), x @ layer.base.dequantize().T)
    for alpha in (1, 0.001, [0.0, 1.0]):
        with pytest.raises(OrthoStreamMissing, match="0 has no ortho stream"):
            set_alpha(model, alpha)
        with (
            pytest.raises(OrthoStreamMissing, match="0 has no ortho stream"),
            alpha_scope(model, alpha),
        ):
            pass
    # The refusal left no layer half switched.
    assert model[1].default_alpha.is_zero
    with pytest.raises(OrthoStreamMissing):
        layer.effective_weight(0.5)
    set_alpha(model, 0)


def test_ortho_stream_that_was_taken_away() -> None:
    layer = make()
    set_alpha(layer, 1.0)
    layer.ortho = None
    with pytest.raises(OrthoStreamMissing, match="base-only"):
        layer(torch.randn(2, IN))


# -- construction ----------------------------------------------------------------


def test_streams_of_two_shapes() -> None:
    base = quantize(torch.randn(OUT, IN))
    other = LowRankOrtho(torch.zeros(IN, 1), torch.zeros(1, OUT))
    with pytest.raises(ValueError, match=rf"\({OUT}, {IN}\).*\({IN}, {OUT}\)"):
        OrthoLinear.from_streams(base, other)
    with pytest.raises(ValueError, match=rf"bias is \({IN},\), expected \({OUT},\)"):
        OrthoLinear.from_streams(base, None, torch.zeros(IN))


def test_bias_is_a_copy_and_no_parameter() -> None:
    linear = nn.Linear(IN, OUT)
    layer = OrthoLinear(linear, use_low_rank=False)
    expected = linear.bias.detach().clone()
    linear.bias.data.zero_()
    assert layer.bias is not None
    assert torch.equal(layer.bias, expected)
    assert list(layer.parameters()) == []
    assert (layer.in_features, layer.out_features) == (IN, OUT)


@pytest.mark.parametrize("module", [nn.Conv2d(3, 3, 1), nn.LayerNorm(4), nn.Embedding(3, 4)])
def test_not_a_linear_layer(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf"{type(module).__name__}.*Linear"):
        OrthoLinear(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float) -> None:
    linear = nn.Linear(IN, OUT)
    linear.weight.data[3, 2] = value
    with pytest.raises(ValueError, match=r"weight holds 1 NaN or Inf"):
        OrthoLinear(linear)


def test_report_measures_the_errors() -> None:
    linear = nn.Linear(IN, OUT)
    layer = OrthoLinear(linear, 0.3, use_low_rank=False, scale="absmax", selection="absolute")
    weight = linear.weight.detach().double()
    report = layer.report
    assert report is not None
    for alpha, error in ((0.0, report.base_error), (1.0, report.final_error)):
        difference = layer.effective_weight(alpha, torch.float64) - weight
        assert error == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-4)
    assert 0 < report.final_error < report.base_error
    assert report.ortho_numel == round(0.3 * IN * OUT)
    assert report.density == pytest.approx(0.3, abs=1 / (IN * OUT))
    assert report.base_bytes == IN * OUT + 4 * OUT
    assert report.ortho_bytes == report.ortho_numel * 6 + 4 * (OUT + 1)


# -- carrying a layer around -----------------------------------------------------


def test_deepcopy_is_independent() -> None:
    layer = make()
    x = torch.randn(3, IN)
    twin = copy.deepcopy(layer)
    set_alpha(twin, 1.0)
    assert torch.equal(layer(x), at(layer, x, 0.0))
    assert torch.equal(twin(x), at(layer, x, 1.0))
    with alpha_scope(layer, 0.5):
        assert torch.equal(twin(x), at(twin, x, 1.0))
    twin.base.qdata.zero_()
    assert layer.base.qdata.any()


@every_form
def test_pickle(kind: str, storage: str, bias: bool) -> None:
    layer = make(kind, storage, bias)
    set_alpha(layer, 0.5)
    twin = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, IN)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(at(twin, x, 1.0), at(layer, x, 1.0))


@every_form
def test_state_dict_round_trip(kind: str, storage: str, bias: bool) -> None:
    source = make(kind, storage, bias)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = copy.deepcopy(source)
    for buffer in target.buffers():
        buffer.zero_()
    target.load_state_dict(torch.load(file))
    x = torch.randn(3, IN)
    assert torch.equal(at(target, x, 1.0), at(source, x, 1.0))
    # alpha is how a model is used, not what it is: it does not travel with the weights.
    set_alpha(source, 1.0)
    target.load_state_dict(source.state_dict())
    assert target.default_alpha.is_zero


@every_form
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_leaves_both_streams_alone(kind: str, storage: str, bias: bool, cast: str) -> None:
    layer = make(kind, storage, bias)
    before = copy.deepcopy(layer.state_dict())
    getattr(nn.Sequential(layer), cast)()
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])


# -- replace_linear_layers -------------------------------------------------------


def test_replaces_every_family(family, random_tokens) -> None:
    model = family.build()
    ids = torch.tensor([item.ids for item in random_tokens([12, 12, 12])])
    original = model(input_ids=ids).logits
    parameters = sum(p.numel() for p in model.parameters())
    targets = (family.mlp, *family.attention)
    result = replace_linear_layers(
        model, targets, 0.3, use_low_rank=False, scale="absmax", selection="absolute"
    )
    assert result is model
    split = {name for name, m in model.named_modules() if isinstance(m, OrthoLinear)}
    assert len(split) == 2 * len(targets)
    for target in targets:
        assert sum(name.endswith(f".{target}") for name in split) == 2
    report = separation_report(model)
    assert {layer.name for layer in report.layers} == split
    assert 0 < report.final_error < report.base_error < 0.02
    assert split.isdisjoint(report.skipped)
    assert sum(p.numel() for p in model.parameters()) < parameters

    def error(alpha: float) -> float:
        with alpha_scope(model, alpha):
            return float((model(input_ids=ids).logits - original).norm() / original.norm())

    assert error(1.0) < error(0.0) < 0.1
    # and the ortho stream is really heard through every target
    for name in split:
        layer = model.get_submodule(name)
        layer.ortho.values.mul_(1000)
    assert error(1.0) > 0.2


def test_split_model_generates_and_trains_its_input(tiny_llama, random_tokens) -> None:
    model = replace_linear_layers(tiny_llama(), use_low_rank=False)
    ids = torch.tensor([random_tokens([6])[0].ids])
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert torch.isfinite(embedded.grad).all()
    assert embedded.grad.any()
    generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 10)


def test_replacing_is_all_or_nothing(tiny_llama, snapshot) -> None:
    model = tiny_llama(intermediate_size=60)
    before = snapshot(model)
    # The second target's width is not divided by the group: found late, after the first was split.
    with pytest.raises(ValueError, match="group_size"):
        replace_linear_layers(model, ("o_proj", "down_proj"), use_low_rank=False, group_size=32)
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())


def test_not_finite_layer_of_a_model_is_named(tiny_llama) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        replace_linear_layers(model, use_low_rank=False)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
