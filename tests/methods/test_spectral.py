"""The original recipe: how many entries, which ones, and when it falls back."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from libortho import (
    OrthoLinear,
    SpectralConfig,
    replace_linear_layers,
    separation_report,
    set_alpha,
)
from libortho.config import BaseConfig
from libortho.methods import spectral
from libortho.methods.spectral import rank_ratio_for, split_spectral
from libortho.ortho import SparseOrtho

QUIET = {"use_low_rank": False}  # random weights have no low-rank part to speak of


def kept_entries(ortho: SparseOrtho) -> Tensor:
    """Where `ortho` has an entry, be it zero."""
    ones = SparseOrtho(ortho.crow, ortho.col, torch.ones_like(ortho.values), ortho.shape)
    return ones.dense() == 1


def steep(rows: int, columns: int) -> Tensor:
    """A weight whose leading singular values are nearly all of it: no fallback."""
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return (u * 0.3 ** torch.arange(min(rows, columns))) @ v


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    ratio=st.floats(1e-4, 1.0),
    selection=st.sampled_from(["relative", "absolute", "magnitude"]),
)
def test_exactly_the_wanted_number_of_entries(
    rows: int, columns: int, ratio: float, selection: str
) -> None:
    config = SpectralConfig(ortho_ratio=ratio, selection=selection, **QUIET)
    split = split_spectral(torch.randn(rows, columns), config)
    assert isinstance(split.ortho, SparseOrtho)
    assert split.ortho.numel == round(ratio * rows * columns)
    assert split.ortho.shape == split.base.shape == (rows, columns)


@pytest.mark.parametrize("block_rows", [1, 2, 9])
@pytest.mark.parametrize("selection", ["relative", "absolute", "magnitude"])
def test_selection_rules(monkeypatch, selection: str, block_rows: int) -> None:
    monkeypatch.setattr(spectral, "BLOCK_BYTES", block_rows * 41 * 4)
    weight = torch.randn(9, 41)
    split = split_spectral(
        weight, SpectralConfig(ortho_ratio=0.1, selection=selection, ortho_dtype="float32", **QUIET)
    )
    residual = (weight - split.base.dequantize()).double()
    score = {
        "relative": residual.abs() / (weight.double().abs() + 1e-8),
        "absolute": residual.abs(),
        "magnitude": weight.double().abs(),
    }[selection]
    kept = kept_entries(split.ortho)
    assert kept.sum() == round(0.1 * weight.numel())
    assert score[kept].min() >= score[~kept].max() * (1 - 1e-6)
    torch.testing.assert_close(split.ortho.dense()[kept].double(), residual[kept])


def test_selection_rules_differ() -> None:
    weight = torch.randn(9, 41)
    masks = [
        kept_entries(
            split_spectral(weight, SpectralConfig(ortho_ratio=0.1, selection=rule, **QUIET)).ortho
        )
        for rule in ("relative", "absolute", "magnitude")
    ]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    assert not torch.equal(masks[0], masks[2])


def test_everything_in_ortho_restores_the_weight() -> None:
    weight = torch.randn(9, 41)
    split = split_spectral(weight, SpectralConfig(ortho_ratio=1.0, ortho_dtype="float32", **QUIET))
    torch.testing.assert_close(split.base.dequantize() + split.ortho.dense(), weight)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_quantises_the_low_rank_part(svd: str) -> None:
    weight = steep(12, 30)
    config = SpectralConfig(rank_ratio=0.5, svd=svd, base=BaseConfig(scale="absmax"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_spectral(weight, config)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    low = (u[:, :6] * s[:6]) @ v[:6]
    step = low.abs().amax(dim=1, keepdim=True) / 127
    assert ((split.base.dequantize(torch.float64) - low).abs() <= 0.51 * step + 1e-6).all()
    assert split.note == ""


def test_fallback_warns_and_quantises_the_weight() -> None:
    weight = torch.randn(12, 30)
    s = torch.linalg.svdvals(weight.double())
    error = s[6:].square().sum().sqrt() / s.square().sum().sqrt()
    assert error > 0.2
    config = SpectralConfig(rank_ratio=0.5)
    with pytest.warns(UserWarning, match=rf"a\.b: .*{re.escape(f'{float(error):.1%}')}.*20%"):
        split = split_spectral(weight, config, "a.b")
    direct = split_spectral(weight, SpectralConfig(**QUIET))
    assert torch.equal(split.base.qdata, direct.base.qdata)
    assert torch.equal(split.ortho.dense(), direct.ortho.dense())
    assert "rank 6" in split.note


@pytest.mark.parametrize(("limit", "warned"), [(0.9, False), (0.05, True)])
def test_fallback_threshold(limit: float, warned: bool) -> None:
    config = SpectralConfig(rank_ratio=0.9, fallback_error=limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = split_spectral(torch.randn(12, 30), config)
    assert bool(caught) == bool(split.note) == warned


def test_without_low_rank_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_spectral(torch.randn(12, 30), SpectralConfig(rank_ratio=0.1, **QUIET))
    assert split.note == ""


def test_fallback_names_the_layer_of_a_model() -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(30, 12)})})
    with pytest.warns(UserWarning, match=r"mlp\.down_proj: low-rank error"):
        replace_linear_layers(model, "down_proj", rank_ratio=0.5)
    (layer,) = separation_report(model).layers
    assert "low-rank error" in layer.note


def test_percentile_scale_by_default() -> None:
    weight = torch.randn(4, 100)
    weight[:, 0] = 50.0
    base = split_spectral(weight, SpectralConfig(**QUIET)).base
    assert base.scale is not None
    ordered = weight.abs().sort(dim=1).values
    torch.testing.assert_close(base.scale, ordered[:, 94:95] / 127)
    assert (base.qdata[:, 0] == 127).all()


@pytest.mark.parametrize("ortho_dtype", ["float16", "bfloat16", "float32"])
def test_ortho_dtype(ortho_dtype: str) -> None:
    split = split_spectral(torch.randn(4, 8), SpectralConfig(ortho_dtype=ortho_dtype, **QUIET))
    assert split.ortho.values.dtype == getattr(torch, ortho_dtype)


def test_conv1d_is_split_like_its_transpose() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(5, 8)  # 8 in, 5 out
    nn.init.normal_(conv.bias)
    linear = nn.Linear(8, 5)
    linear.weight.data = conv.weight.data.T.clone()
    linear.bias.data = conv.bias.data.clone()
    ours = OrthoLinear(conv, 0.1, use_low_rank=False)
    theirs = OrthoLinear(linear, 0.1, use_low_rank=False)
    x = torch.randn(3, 8)
    assert ours(x).shape == (3, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.effective_weight(1.0), theirs.effective_weight(1.0))
    full = OrthoLinear(conv, 1.0, use_low_rank=False, ortho_dtype="float32")
    set_alpha(full, 1.0)
    torch.testing.assert_close(full(x), conv(x))


NAMES = ["a.0.up", "a.0.down", "a.1.down"]


def test_rank_ratio_mapping() -> None:
    assert rank_ratio_for(0.5, NAMES) == dict.fromkeys(NAMES, 0.5)
    assert rank_ratio_for({"down": 0.5, r"a\.\d\.up": 0.9}, NAMES) == {
        "a.0.up": 0.9,
        "a.0.down": 0.5,
        "a.1.down": 0.5,
    }
    assert rank_ratio_for({"down": 0.5, "up": 0.5, "0.down": 0.5}, NAMES)["a.0.down"] == 0.5


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"down": 0.5}, r"no value for: a\.0\.up"),
        ({"down": 0.5, "up": 0.5, "gate": 0.5}, r"'gate'.*a\.0\.up"),
        ({"down": 0.5, "up": 0.5, "0.down": 0.6}, r"a\.0\.down both 0\.5 and 0\.6"),
        ({"(": 0.5}, r"'\(' is no regular expression"),
    ],
)
def test_rank_ratio_mapping_errors(mapping: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_ratio_for(mapping, NAMES)


def test_rank_ratio_mapping_reaches_each_layer() -> None:
    model = nn.ModuleDict({"up": nn.Linear(30, 12), "down": nn.Linear(12, 30)})
    weights = {}
    for name in model:
        weights[name] = steep(*model[name].weight.shape)
        model[name].weight.data = weights[name].clone()
    kwargs = {"target_modules": ("up", "down"), "scale": "absmax"}
    replace_linear_layers(model, rank_ratio={"up": 0.99, "down": 0.25}, **kwargs)
    ranks = {"up": 11, "down": 3}
    for name, rank in ranks.items():
        u, s, v = torch.linalg.svd(weights[name].double(), full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ v[:rank]
        step = low.abs().amax(dim=1, keepdim=True) / 127
        found = model[name].base.dequantize(torch.float64)
        assert ((found - low).abs() <= 0.51 * step + 1e-6).all()


def test_one_layer_takes_no_mapping() -> None:
    with pytest.raises(TypeError, match="mapping"):
        split_spectral(torch.randn(4, 4), SpectralConfig(rank_ratio={"x": 0.5}))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ortho_ratio", 0.0, ValueError),
        ("ortho_ratio", 1.5, ValueError),
        ("ortho_ratio", float("nan"), ValueError),
        ("ortho_ratio", "1", TypeError),
        ("ortho_ratio", True, TypeError),
        ("rank_ratio", 0.0, ValueError),
        ("rank_ratio", {"down": 2.0}, ValueError),
        ("svd", "fast", ValueError),
        ("selection", "largest", ValueError),
        ("ortho_dtype", "int8", ValueError),
        ("fallback_error", -0.1, ValueError),
    ],
)
def test_config_errors_name_the_field(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=field):
        SpectralConfig(**{field: value})


def test_a_zero_weight() -> None:
    split = split_spectral(torch.zeros(4, 6), SpectralConfig())
    assert (split.base.dequantize() == 0).all()
    assert (split.ortho.dense() == 0).all()
