"""The target compressed-tensors, read by transformers' own reader of that format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from libortho import BaseConfig
from libortho.alpha import ortho_layers
from libortho.export import CompressedTensorsExport, export_split
from libortho.layer import OrthoLinear

pytest.importorskip("compressed_tensors")
peft = pytest.importorskip("peft")

TARGETS = ("down_proj", "o_proj")


def unpacked(words: Tensor) -> Tensor:
    """int32 (rows, columns / 4) -> int8 (rows, columns): four bytes a word, low first, less 128."""
    shifts = torch.tensor([0, 8, 16, 24])
    return (((words.unsqueeze(-1) >> shifts) & 255) - 128).flatten(-2).to(torch.int8)


@pytest.mark.parametrize("group", [None, 8])
def test_w8a16(group, split, tiny_llama, logits, load, read_json, tmp_path: Path) -> None:
    model = split(tiny_llama(), TARGETS, base=BaseConfig(group_size=group))
    out = tmp_path / "out"
    report = export_split(model, out, CompressedTensorsExport(alphas=(1.0, 0.5)))
    assert report.weight_error == 0.0
    assert report.adapters == {"ortho": 1.0, "ortho-0.5": 0.5}

    tensors = load_file(out / "base" / "model.safetensors")
    for name, layer in ortho_layers(model).items():
        assert torch.equal(unpacked(tensors[f"{name}.weight_packed"]), layer.base.qdata)
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.base.scale)
        assert tensors[f"{name}.weight_shape"].tolist() == list(layer.base.shape)
        assert f"{name}.weight" not in tensors
    config = read_json(out / "base" / "config.json")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    (scheme,) = config["config_groups"].values()
    assert scheme["weights"]["strategy"] == ("channel" if group is None else "group")
    assert scheme["weights"].get("group_size") == group
    assert "input_activations" not in scheme
    plain = tiny_llama()
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert set(config["ignore"]) == linear - set(ortho_layers(model))

    base = load(out / "base")
    near = {"atol": 5e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits(base), logits(model, 0.0), **near)
    # PEFT needs weights as numbers: transformers has made them so in the run above.
    exported = peft.PeftModel.from_pretrained(base, out / "ortho")
    torch.testing.assert_close(logits(exported), logits(model, 1.0), **near)


def test_bf16_rounds_the_scales_alone(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama().bfloat16(), TARGETS)
    report = export_split(model, tmp_path / "out", CompressedTensorsExport())
    assert 1e-4 < report.weight_error < 2.5e-3
    tensors = load_file(tmp_path / "out" / "base" / "model.safetensors")
    for name, layer in ortho_layers(model).items():
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.base.scale.bfloat16())
    base = load(tmp_path / "out" / "base", dtype="auto")
    wanted = logits(model, 0.0)
    assert float((logits(base) - wanted).norm() / wanted.norm()) < 0.03


def rounded(x: Tensor) -> Tensor:
    """Activations as W8A8 sees them: one scale a token, its absmax over 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def test_w8a8(split, tiny_llama, logits, load, read_json, tmp_path: Path) -> None:
    model = split(tiny_llama(), TARGETS)
    out = tmp_path / "out"
    report = export_split(model, out, CompressedTensorsExport(activations="int8"))
    assert "activations" in report.notes[0]
    tensors = load_file(out / "base" / "model.safetensors")
    for name, layer in ortho_layers(model).items():
        assert torch.equal(tensors[f"{name}.weight"], layer.base.qdata)
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.base.scale)
    config = read_json(out / "base" / "config.json")["quantization_config"]
    assert config["format"] == "int-quantized"
    (scheme,) = config["config_groups"].values()
    inputs = scheme["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)

    # What an engine makes of these files: the split model with rounded activations.
    for layer in ortho_layers(model).values():
        layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    found = logits(load(out / "base"))
    expected = logits(model, 0.0)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_base_alone(split, tiny_llama, tmp_path: Path) -> None:
    model = split(tiny_llama(), TARGETS, kind="sparse")
    with pytest.raises(ValueError, match="vLLM has no sparse adapter"):
        export_split(model, tmp_path / "out", CompressedTensorsExport())
    assert not (tmp_path / "out").exists()
    report = export_split(model, tmp_path / "out", CompressedTensorsExport(alphas=()))
    assert report.adapters == {}
    assert (tmp_path / "out" / "base" / "config.json").is_file()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (BaseConfig(storage="int4", group_size=8), "INT4 base, whose zero points are in 16ths"),
        (BaseConfig(storage="fp16"), "FP16 base, which is not quantised"),
    ],
)
def test_other_bases_are_refused(base, message, split, tiny_llama, tmp_path: Path) -> None:
    model = split(tiny_llama(), TARGETS, base=base)
    with pytest.raises(TypeError, match=f"o_proj has an {message}"):
        export_split(model, tmp_path / "out", CompressedTensorsExport())
    assert not (tmp_path / "out").exists()


def test_what_vllm_fuses_must_be_whole(split, tiny_llama, tmp_path: Path) -> None:
    model = split(tiny_llama(), ("q_proj", "k_proj", "v_proj"))
    export_split(model, tmp_path / "all", CompressedTensorsExport())
    model = split(tiny_llama(), ("q_proj", "up_proj"))
    with pytest.raises(ValueError, match=r"q_proj is split and k_proj, v_proj beside it not"):
        export_split(model, tmp_path / "some", CompressedTensorsExport())


def test_one_group_size_for_all(split, tiny_llama, tmp_path: Path) -> None:
    model = split(tiny_llama(), ("o_proj",), base=BaseConfig(group_size=8))
    with pytest.raises(ValueError, match="W8A8 with one scale a row only"):
        export_split(model, tmp_path / "out", CompressedTensorsExport(activations="int8"))
    split(model, ("down_proj",))
    with pytest.raises(ValueError, match=r"differ between layers \(.*o_proj: 8, .*: a row\)"):
        export_split(model, tmp_path / "out", CompressedTensorsExport())


def test_conv1d_is_refused(split, families, tmp_path: Path) -> None:
    model = split(families["gpt2"].build(), ("mlp.c_proj",))
    with pytest.raises(TypeError, match=r"c_proj is a Conv1D.*use the target peft"):
        export_split(model, tmp_path / "out", CompressedTensorsExport())


def test_unknown_base_streams_are_refused(split, tiny_llama, tmp_path: Path) -> None:
    model = split(tiny_llama(), TARGETS)
    layers: dict[str, Any] = ortho_layers(model)
    name, layer = next(iter(layers.items()))

    class Other(type(layer.base).__mro__[1]):
        pass

    layer.base = Other(layer.base.qdata, layer.base.scale)
    assert isinstance(layer, OrthoLinear)
    with pytest.raises(TypeError, match=f"{name}.base is a Other: expected an Int8Base"):
        export_split(model, tmp_path / "out", CompressedTensorsExport())


def test_activations_are_checked() -> None:
    with pytest.raises(ValueError, match="activations='fp8': expected one of '16bit', 'int8'"):
        CompressedTensorsExport(activations="fp8")
