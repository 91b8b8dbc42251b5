"""The target dense: an ordinary model, at any alpha the same function as the split one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from libortho import OrthoStreamMissing
from libortho.alpha import ortho_layers
from libortho.export import DenseExport, export_split

TARGETS = {
    "llama": ("down_proj", "o_proj"),
    "qwen2": ("q_proj", "down_proj"),  # q_proj has a bias
    "gpt2": ("attn.c_attn", "mlp.c_proj"),  # Conv1D, embedding tied to the head
    "phi": ("fc2", "lm_head"),  # a head with a bias
}


@pytest.mark.parametrize("family", TARGETS)
def test_equals_the_split_model(family, families, split, logits, load, tmp_path: Path) -> None:
    model = split(families[family].build(), TARGETS[family])
    for alpha in (0.0, 0.3, 1.0):
        out = tmp_path / f"{alpha}"
        report = export_split(model, out, DenseExport(alpha))
        assert report.layers == len(ortho_layers(model))
        assert report.weight_error == 0.0  # fp32 model: nothing is rounded
        plain = load(out)
        assert not [m for m in plain.modules() if type(m).__name__ == "OrthoLinear"]
        torch.testing.assert_close(logits(plain), logits(model, alpha), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits(model, 0.0), logits(model, 1.0), atol=0.1)


def test_weights_are_rounded_once(split, tiny_llama, load, tmp_path: Path) -> None:
    model = split(tiny_llama().bfloat16())
    report = export_split(model, tmp_path / "out", DenseExport(0.5))
    plain = load(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    worst = 0.0
    for name, layer in ortho_layers(model).items():
        exact = layer.effective_weight(0.5)
        assert torch.equal(plain.get_submodule(name).weight, exact.bfloat16())
        worst = max(worst, float((exact.bfloat16().float() - exact).norm() / exact.norm()))
    assert report.weight_error == pytest.approx(worst)
    assert 5e-4 < report.weight_error < 2.5e-3
    assert torch.equal(plain.model.norm.weight, model.model.norm.weight)


def test_dtype_is_that_of_every_parameter(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama())
    export_split(model, tmp_path / "out", DenseExport(1.0, dtype="bfloat16"))
    plain = load(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    spread = float(logits(model, 1.0).std())
    assert float((logits(plain) - logits(model, 1.0)).abs().max()) < 0.1 * spread
    assert model.dtype == torch.float32


def test_the_split_model_stays_as_it_is(split, tiny_llama, snapshot, tmp_path: Path) -> None:
    model = split(tiny_llama())
    before, config = snapshot(model), copy.deepcopy(model.config)
    export_split(model, tmp_path / "out", DenseExport(1.0, dtype="float16"))
    after = snapshot(model)
    assert before["modules"] == after["modules"]
    state = after["state"]
    assert all(torch.equal(value, state[key]) for key, value in before["state"].items())
    assert {value.dtype for value in before["state"].values()} == {
        value.dtype for value in state.values()
    }
    assert model.config.to_dict() == config.to_dict()


def test_a_head_that_is_tied_no_more(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(
        model.lm_head.weight.detach() + 0.1, requires_grad=False
    )  # as one has to before it can be split
    split(model, ("lm_head",))
    assert model.config.tie_word_embeddings
    export_split(model, tmp_path / "out", DenseExport(1.0))
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(model, 1.0), atol=2e-5, rtol=1e-5
    )


def test_generation_settings_that_transformers_would_not_save(
    split, tiny_llama, load, tmp_path: Path
) -> None:
    model = split(tiny_llama())
    model.generation_config.temperature = 0.3  # without do_sample: many published models have it
    export_split(model, tmp_path / "out", DenseExport())
    assert load(tmp_path / "out").generation_config.temperature == 0.3
    assert model.generation_config.temperature == 0.3


def test_a_quantisation_note_in_the_config_is_not_passed_on(
    split, tiny_llama, read_json, tmp_path: Path
) -> None:
    model = split(tiny_llama())
    model.config.quantization_config = {"quant_method": "libortho"}
    export_split(model, tmp_path / "out", DenseExport())
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert model.config.quantization_config == {"quant_method": "libortho"}


def test_base_only(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama())
    for layer in ortho_layers(model).values():
        layer.ortho = None
    export_split(model, tmp_path / "out", DenseExport(0.0))
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(model, 0.0), atol=2e-5, rtol=1e-5
    )
    with pytest.raises(OrthoStreamMissing, match="no ortho stream"):
        export_split(model, tmp_path / "more", DenseExport(0.5))
    assert not (tmp_path / "more").exists()


def test_what_does_not_fit_the_dtype(split, tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    split(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj.*beyond torch\.float16"):
        export_split(model, tmp_path / "out", DenseExport(0.0, dtype="float16"))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha=.*\[0, 1\]"):
        DenseExport(alpha)


def test_dtype_is_checked() -> None:
    with pytest.raises(ValueError, match="dtype='int8': expected one of 'float16'"):
        DenseExport(dtype="int8")
