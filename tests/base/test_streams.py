"""The base stream: scales, rounding, clamping, and data that no cast of the model changes."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from libortho.base import HalfBase, Int8Base, error_feedback, quantize
from libortho.config import BaseConfig
from libortho.kernels import reference


def stored(weight: Tensor, **config: object) -> tuple[Tensor, Tensor]:
    base = quantize(weight, BaseConfig(**config))
    assert isinstance(base, Int8Base)
    assert base.scale is not None
    return base.qdata, base.scale


def small(storage: str) -> BaseConfig:
    """A config for layers of 8 columns."""
    return BaseConfig(storage=storage, group_size=4 if storage == "int4" else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_absmax(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 41).to(dtype)
    qdata, scale = stored(weight)
    exact = weight.double()
    reach = exact.abs().amax(dim=1, keepdim=True)
    assert qdata.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (9, 1)
    torch.testing.assert_close(scale.double(), reach / 127, rtol=1e-6, atol=0)
    assert (qdata.abs().amax(dim=1) == 127).all()
    # Nothing is clamped: every entry is at most half a step away.
    error = (qdata.double() * reach / 127 - exact).abs()
    assert (error <= 0.5001 * reach / 127).all()


@pytest.mark.parametrize("columns", [1, 7, 20, 41, 100])
@pytest.mark.parametrize("percentile", [0.95, 0.5, 1.0])
def test_percentile(columns: int, percentile: float) -> None:
    weight = torch.randn(6, columns)
    qdata, scale = stored(weight, scale="percentile", percentile=percentile)
    share = Fraction(str(percentile)) * columns
    rank = max(1, -(-share.numerator // share.denominator))  # rounded up
    for row in range(6):
        reach = sorted(weight[row].abs().tolist())[rank - 1]
        assert scale[row].item() == pytest.approx(reach / 127, rel=1e-6)
        expected = [max(-127, min(127, round(w / (reach / 127)))) for w in weight[row].tolist()]
        # A quotient that is a half up to rounding may go either way.
        assert (qdata[row].int() - torch.tensor(expected)).abs().max() <= 1
        assert (
            qdata[row].tolist().count(127) + qdata[row].tolist().count(-127) >= columns - rank + 1
        )


def test_percentile_clamps_what_absmax_keeps() -> None:
    weight = torch.full((1, 100), 0.01)
    weight[0, 3], weight[0, 5] = 10.0, -10.0
    base = quantize(weight, BaseConfig(scale="percentile"))
    assert base.qdata[0, 3] == 127
    assert base.qdata[0, 5] == -127
    assert base.dequantize()[0, 3].item() == pytest.approx(0.01, rel=1e-5)
    assert quantize(weight).dequantize()[0, 3].item() == pytest.approx(10.0, rel=1e-5)


def test_percentile_of_a_sparse_row_is_its_maximum() -> None:
    weight = torch.zeros(1, 100)
    weight[0, 0] = 3.0
    base = quantize(weight, BaseConfig(scale="percentile"))
    torch.testing.assert_close(base.dequantize(), weight)


@pytest.mark.parametrize("scale", ["absmax", "percentile"])
def test_groups(scale: str) -> None:
    weight = torch.randn(5, 12) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(4)
    qdata, scales = stored(weight, scale=scale, group_size=4)
    assert scales.shape == (5, 3)
    for group in range(3):
        columns = slice(4 * group, 4 * group + 4)
        alone, alone_scale = stored(weight[:, columns], scale=scale)
        assert torch.equal(qdata[:, columns], alone)
        assert torch.equal(scales[:, group : group + 1], alone_scale)
    base = quantize(weight, BaseConfig(scale=scale, group_size=4))
    wide = scales.repeat_interleave(4, dim=1)
    torch.testing.assert_close(base.dequantize(torch.float64), (qdata * wide).double())


@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 4),
    group=st.integers(1, 9),
    exponent=st.integers(-12, 12),
)
def test_absmax_error_is_half_a_step(rows: int, groups: int, group: int, exponent: int) -> None:
    weight = torch.randn(rows, groups * group) * 10.0**exponent
    base = quantize(weight, BaseConfig(group_size=group))
    reach = weight.double().abs().reshape(rows, groups, group).amax(dim=2)
    step = (reach / 127).repeat_interleave(group, dim=1)
    error = (base.dequantize(torch.float64) - weight.double()).abs()
    assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize("scale", ["absmax", "percentile"])
def test_zero_rows(scale: str) -> None:
    weight = torch.randn(4, 8)
    weight[1] = 0
    base = quantize(weight, BaseConfig(scale=scale))
    assert torch.isfinite(base.dequantize()).all()
    assert (base.dequantize()[1] == 0).all()
    assert (quantize(torch.zeros(3, 5), BaseConfig(scale=scale)).dequantize() == 0).all()


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"group_size=5 .* 12 input features"):
        quantize(torch.randn(3, 12), BaseConfig(group_size=5))


@pytest.mark.parametrize("group_size", [0, -1, 2.0, True, "4"])
def test_group_size_that_is_none(group_size: object) -> None:
    with pytest.raises(ValueError, match="group_size"):
        BaseConfig(group_size=group_size)


def test_fp16_storage() -> None:
    weight = torch.randn(9, 7, dtype=torch.float64)
    base = quantize(weight, BaseConfig(storage="fp16"))
    assert isinstance(base, HalfBase)
    assert base.scale is None
    assert torch.equal(base.qdata, weight.to(torch.float16))
    assert base.nbytes == 2 * 9 * 7


def test_fp16_overflow() -> None:
    weight = torch.randn(3, 4)
    weight[2, 1] = -7e4
    with pytest.raises(ValueError, match=r"70000.*65504.*int8"):
        quantize(weight, BaseConfig(storage="fp16"))
    assert quantize(weight).dequantize()[2, 1].item() == pytest.approx(-7e4)


def test_quantising_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(23, 10)
    moment = torch.randn(40, 10)
    moment = moment.T @ moment
    for config in (
        BaseConfig(),
        BaseConfig(scale="percentile", group_size=5),
        BaseConfig(storage="int4", group_size=5, rounding="nearest"),
        BaseConfig(storage="int4", group_size=5),
    ):
        whole = quantize(weight, config, moment)
        monkeypatch.setattr(reference, "BLOCK_BYTES", 100)
        monkeypatch.setattr(error_feedback, "ROW_BYTES", 100)
        blocks = quantize(weight, config, moment)
        monkeypatch.undo()
        assert whole.state_dict().keys() == blocks.state_dict().keys()
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, blocks.state_dict()[name])


def test_quantising_leaves_its_argument_alone() -> None:
    weight, moment = torch.randn(4, 6), torch.eye(6)
    before = weight.clone()
    for config in (
        BaseConfig(),
        BaseConfig(scale="percentile"),
        BaseConfig(storage="fp16"),
        BaseConfig(storage="int4", group_size=3),
        BaseConfig(storage="int4", group_size=3, rounding="nearest"),
    ):
        quantize(weight, config, moment)
        assert torch.equal(weight, before)
        assert torch.equal(moment, torch.eye(6))


@pytest.mark.parametrize("storage", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_cast_of_the_model_leaves_the_data_alone(storage: str, cast: str) -> None:
    # Scales that neither fp16 nor bf16 can hold.
    weight = torch.randn(6, 8) if storage == "fp16" else torch.randn(6, 8) * 1e-7
    model = nn.Sequential(quantize(weight, small(storage)), nn.Linear(6, 2))
    before = copy.deepcopy(model[0].state_dict())
    dtype = getattr(getattr(model, cast)()[1], "weight").dtype  # noqa: B009
    after = model[0].state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert model(torch.randn(3, 8).to(dtype)).dtype == dtype


@pytest.mark.parametrize("storage", ["int8", "int4", "fp16"])
def test_forward(storage: str) -> None:
    base = quantize(torch.randn(5, 8), small(storage))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(base(x), x @ base.dequantize().T)


@pytest.mark.parametrize("storage", ["int8", "int4", "fp16"])
def test_state_dict_round_trip(storage: str) -> None:
    config = small(storage)
    source, target = quantize(torch.randn(5, 8), config), quantize(torch.zeros(5, 8), config)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dequantize(), source.dequantize())
    assert source.nbytes == sum(t.nbytes for t in source.state_dict().values())
