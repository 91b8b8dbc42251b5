"""INT4: codes in groups with a scale and a zero point, what is clipped, and how few bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from libortho import (
    CurvatureConfig,
    OrthoLinear,
    SaliencyConfig,
    SpectralConfig,
    replace_linear_layers,
    separation_report,
)
from libortho.base import Int4Base, quantize
from libortho.base.grid import CLIPS, choose_grid
from libortho.config import BaseConfig
from libortho.methods.spectral import split_spectral
from libortho.report import Split, measure_layer


def config(group: int | None = 8, **changes: object) -> BaseConfig:
    return BaseConfig(storage="int4", group_size=group, **changes)  # type: ignore[arg-type]


def by_hand(base: Int4Base) -> Tensor:
    """The stored matrix in float64, one number at a time."""
    rows, columns = base.shape
    group = columns // base.scale.shape[1]
    matrix = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            byte = int(base.qdata[row, column // 2])
            code = byte % 16 if column % 2 == 0 else byte // 16
            zero = int(base.zero[row, column // group]) / 16
            matrix[row, column] = (code - zero) * float(base.scale[row, column // group])
    return matrix


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    group=st.integers(1, 9),
    scale=st.sampled_from(["absmax", "search"]),
    exponent=st.integers(-12, 12),
)
def test_dequantises_as_by_hand_within_a_step(
    rows: int, groups: int, group: int, scale: str, exponent: int
) -> None:
    if groups * group % 2:
        group += 1
        groups += groups % 2
    weight = (torch.randn(rows, groups * group) + torch.randn(rows, 1)) * 10.0**exponent
    base = quantize(weight, config(group, scale=scale))
    assert isinstance(base, Int4Base)
    assert base.shape == weight.shape
    assert base.qdata.shape == (rows, groups * group // 2)
    assert (base.qdata.dtype, base.zero.dtype) == (torch.uint8, torch.uint8)
    assert base.scale.dtype == torch.bfloat16
    assert base.scale.shape == base.zero.shape == (rows, groups)
    assert torch.equal(base.dequantize(torch.float64), by_hand(base))
    assert torch.equal(base.dequantize(rows=slice(0, 1)), base.dequantize()[:1])
    if scale == "absmax":
        # Half a step, and what rounding scale (2^-9 of 15 steps) and zero (1/32) can move the ends.
        step = base.scale.double().repeat_interleave(group, dim=1)
        error = (base.dequantize(torch.float64) - weight.double()).abs()
        assert (error <= (0.5 + 15 / 512 + 1 / 32) * 1.001 * step).all()


def test_the_ends_of_a_group_are_held() -> None:
    weight = torch.tensor([[-3.0, 0.0, 1.0, 12.0], [5.0, 6.0, 7.0, 7.5], [-15, -7, -1, -0.4]])
    base = quantize(weight, config(4, scale="absmax"))
    assert base.scale.flatten().tolist() == [1.0, 0.5, 1.0]
    assert base.zero.flatten().tolist() == [48, 0, 240]
    weight[2, 3] = 0.0
    assert torch.equal(base.dequantize(), weight)


def test_zero_groups_stay_zero() -> None:
    weight = torch.randn(4, 16)
    weight[1] = 0
    weight[2, 8:] = 0
    for scale in ("absmax", "search"):
        found = quantize(weight, config(8, scale=scale)).dequantize()
        assert torch.isfinite(found).all()
        assert not found[weight == 0].any()


def reference_search(weight: Tensor, importance: Tensor, group: int) -> Tensor:
    """The least weighted error of each group over all clippings, in float64 loops."""
    rows, columns = weight.shape
    best = torch.full((rows, columns // group), float("inf"), dtype=torch.float64)
    for row in range(rows):
        for g in range(columns // group):
            w = weight[row, g * group : (g + 1) * group].double()
            h = importance[g * group : (g + 1) * group].double()
            low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
            for a in CLIPS:
                for b in CLIPS:
                    scale = float(torch.tensor((b * high - a * low) / 15).bfloat16())
                    zero = min(max(round(-a * low / scale * 16), 0), 240) / 16
                    codes = (w / scale + zero).round().clamp(0, 15)
                    error = (h * ((codes - zero) * scale - w).square()).sum()
                    best[row, g] = torch.minimum(best[row, g], error)
    return best


@pytest.mark.parametrize("weighted", [False, True])
def test_search_finds_the_best_clipping(weighted: bool) -> None:
    weight = torch.randn(5, 24) ** 3
    moment = torch.diag(torch.rand(24) ** 4 + 1e-4)
    importance = moment.diagonal() if weighted else torch.ones(24)
    how = config(12, rounding="nearest")
    found = quantize(weight, how, moment if weighted else None).dequantize(torch.float64)
    error = ((found - weight.double()).square() * importance.double()).reshape(5, 2, 12).sum(-1)
    best = reference_search(weight, importance, 12)
    torch.testing.assert_close(error, best, rtol=1e-3, atol=0)
    plain = quantize(weight, config(12, scale="absmax")).dequantize(torch.float64)
    unclipped = ((plain - weight.double()).square() * importance.double()).reshape(5, 2, 12).sum(-1)
    assert (error <= unclipped * 1.0001).all()
    assert error.sum() < 0.9 * unclipped.sum()


def test_search_with_int8() -> None:
    weight = torch.randn(6, 640)
    weight[:, 0] = 20.0
    moment = torch.eye(640)
    moment[0, 0] = 0.0  # an outlier that no input ever meets
    how = BaseConfig(scale="search")
    found = quantize(weight, how, moment)
    plain = quantize(weight)
    assert (found.scale / plain.scale <= 0.8).all()
    rest = weight[:, 1:]
    assert (found.dequantize()[:, 1:] - rest).norm() < (plain.dequantize()[:, 1:] - rest).norm()
    grid = choose_grid(weight, how)
    assert float((grid.scale / plain.scale).max()) == 1.0


# -- sizes and refusals ----------------------------------------------------------


@pytest.mark.parametrize(("group", "most"), [(64, 0.289), (128, 0.278)])
@pytest.mark.parametrize("shape", [(2048, 5632), (576, 1536)])
def test_bytes_of_a_layer(shape: tuple[int, int], group: int, most: float) -> None:
    weight = torch.randn(shape) * 0.02
    split = split_spectral(
        weight,
        SpectralConfig(ortho_ratio=0.005, use_low_rank=False, base=config(group, scale="absmax")),
    )
    stored = sum(t.nbytes for t in (*split.base.buffers(), *split.ortho.buffers()))
    half = 2 * weight.numel()
    rows, columns = shape
    assert split.base.nbytes == rows * columns // 2 + 3 * rows * columns // group
    assert stored == split.base.nbytes + split.ortho.nbytes
    assert stored / half <= 0.29  # the bar
    assert stored / half <= most + 2 / columns  # and the row pointers of CSR


def test_default_is_groups_of_64_with_a_search() -> None:
    made = BaseConfig(storage="int4")
    assert (made.group_size, made.scale, made.rounding) == (64, "search", None)
    assert (BaseConfig().group_size, BaseConfig().scale) == (None, "absmax")
    assert BaseConfig(storage="fp16").group_size is None


@pytest.mark.parametrize(
    ("columns", "group", "match"),
    [
        (96, 64, r"group_size=64 does not divide the 96 input features.*storage='int8'"),
        (63, 63, r"two columns to a byte.*63 input features.*even"),
        (63, 64, r"63 input features"),
    ],
)
def test_widths_that_do_not_fit(columns: int, group: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quantize(torch.randn(3, columns), config(group))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"storage": "int4", "scale": "percentile"}, "scale='percentile' with storage='int4'"),
        ({"storage": "int3"}, "storage='int3'.*'int4'"),
        ({"scale": "clip"}, "scale='clip'.*'search'"),
        ({"rounding": "up"}, "rounding='up'.*'error_feedback'"),
        ({"storage": "fp16", "rounding": "error_feedback"}, "with storage='fp16'"),
    ],
)
def test_configs_that_are_none(changes: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BaseConfig(**changes)  # type: ignore[arg-type]


# -- in a layer ------------------------------------------------------------------


def layer() -> OrthoLinear:
    linear = nn.Linear(128, 9)
    return OrthoLinear(linear, 0.2, use_low_rank=False, storage="int4", selection="absolute")


def test_gradients_reach_the_input() -> None:
    split = layer()
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(split(x).sum(), x)
    expected = split.base.dequantize(torch.float64).sum(0).expand(3, -1)
    torch.testing.assert_close(grad, expected)


def test_report_of_a_layer() -> None:
    linear = nn.Linear(128, 9)
    split = layer()
    weight = linear.weight.detach()
    base = quantize(weight, BaseConfig(storage="int4"))
    assert split.ortho is not None
    report = measure_layer("x", "test", weight, Split(base, split.ortho))
    difference = base.dequantize(torch.float64) - weight.double()
    assert report.base_error == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-5)
    assert report.shape == (9, 128)
    assert report.base_bytes == 9 * (64 + 2 * 3)
    assert split.report is not None
    assert 0 < split.report.final_error < split.report.base_error < 0.1


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_cast_leaves_both_streams_alone(cast: str) -> None:
    model = nn.Sequential(layer())
    before = copy.deepcopy(model.state_dict())
    getattr(model, cast)()
    for name, tensor in model.state_dict().items():
        if not name.endswith("bias"):
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])


def test_deepcopy_is_independent() -> None:
    split = layer()
    twin = copy.deepcopy(split)
    x = torch.randn(3, 128)
    assert torch.equal(twin(x), split(x))
    twin.base.qdata.zero_()
    assert split.base.qdata.any()


def test_replace_linear_layers(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    ids = torch.tensor([item.ids for item in random_tokens([12, 12])])
    original = model(input_ids=ids).logits
    replace_linear_layers(
        model, ("down_proj",), 0.3, use_low_rank=False, storage="int4", selection="absolute"
    )
    report = separation_report(model)
    assert {x.base_bytes for x in report.layers} == {32 * (32 + 3)}
    assert 0 < report.final_error < report.base_error < 0.1
    error = float((model(input_ids=ids).logits - original).norm() / original.norm())
    assert 0 < error < 0.3
    with pytest.raises(ValueError, match=r"group_size=64 does not divide the 32 input features"):
        replace_linear_layers(model, ("q_proj",), storage="int4")


def test_methods_without_a_moment_refuse_error_feedback() -> None:
    for method in (SpectralConfig, SaliencyConfig, CurvatureConfig):
        with pytest.raises(ValueError, match=r"needs a second moment .* method takes none"):
            method(base=config(rounding="error_feedback"))
        method(base=config(rounding="nearest"))
    with pytest.raises(ValueError, match="second moment"):
        quantize(torch.randn(2, 8), config(rounding="error_feedback"))
