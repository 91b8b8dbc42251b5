"""Loading: every tensor and logit comes back bit for bit, and errors name the file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from libortho import BaseConfig, CheckpointError, OrthoLinear, separation_report, set_alpha
from libortho.alpha import ortho_layers
from libortho.base import quantize
from libortho.checkpoint import OrthoKey, load_split, save_split, verify_split
from libortho.integrations import transformers as integration
from libortho.linear import install, read_linear, select_linear
from libortho.ortho import LowRankOrtho, SparseOrtho

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_round_trip_is_bit_for_bit(
    split_model, logits_of, same_bits, assert_same_model, family: str, kind: str, tmp_path: Path
) -> None:
    model = split_model(family, kind)
    save_split(model, tmp_path / "m")
    loaded = load_split(tmp_path / "m")
    assert type(loaded) is type(model)
    assert_same_model(model, loaded)
    assert not same_bits(logits_of(loaded, 0.0), logits_of(loaded, 1.0))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(layer.default_alpha.is_zero for layer in ortho_layers(loaded).values())


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_every_base_storage(
    split_model, assert_same_model, base: BaseConfig, kind: str, tmp_path: Path
) -> None:
    model = split_model("opt", kind, base)
    save_split(model, tmp_path / "m")
    assert_same_model(model, load_split(tmp_path / "m"))
    found = verify_split(tmp_path / "m")
    assert {layer.base for layer in found.manifest.layers.values()} == {base.storage}
    assert found.ortho is not None
    assert found.ortho.layers == dict.fromkeys(found.manifest.layers, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_comes_back_as_it_was(
    split_model, assert_same_model, dtype: torch.dtype, tmp_path: Path
) -> None:
    # .to() casts computed buffers too (rotary frequencies), which the config alone cannot tell.
    model = split_model("gemma").to(dtype)
    assert model.model.rotary_emb.inv_freq.dtype == dtype
    save_split(model, tmp_path / "m")
    assert_same_model(model, load_split(tmp_path / "m"))


def test_a_model_built_in_bfloat16(
    families, split_layer, assert_same_model, tmp_path: Path
) -> None:
    config = families["gemma3"][0]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    targets = select_linear(model, "down_proj")
    install(model, {n: split_layer(m, "sparse", BaseConfig(), n) for n, m in targets.items()})
    save_split(model, tmp_path / "m")
    assert_same_model(model, load_split(tmp_path / "m"))


def test_dtype_casts_all_but_the_streams(logits_of, same_bits, saved: Path) -> None:
    plain, cast = load_split(saved), load_split(saved, dtype=torch.bfloat16)
    assert cast.dtype == cast.config.dtype == torch.bfloat16
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, parameter in cast.named_parameters():
        assert same_bits(parameter, plain.get_parameter(name).to(torch.bfloat16))
    for name, layer in ortho_layers(cast).items():
        for stored, other in zip(layer.buffers(), plain.get_submodule(name).buffers(), strict=True):
            assert same_bits(stored, other)
    assert logits_of(cast, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_dtype_must_be_floating(saved: Path, dtype: Any) -> None:
    with pytest.raises(TypeError, match="floating"):
        load_split(saved, dtype=dtype)


def test_tied_weights_are_saved_once_and_tied_again(split_model, tmp_path: Path) -> None:
    model = split_model("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_split(model, tmp_path / "m")
    names = set(load_file(tmp_path / "m/model.safetensors"))
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    loaded = load_split(tmp_path / "m", dtype=torch.float16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_split_lm_head_that_was_untied_stays_split(
    new_model, split_layer, assert_same_model, tmp_path: Path
) -> None:
    # The config still says "tied"; what was saved decides.
    model = new_model("qwen2")
    head = nn.Linear(24, 61, bias=False)
    install(model, {"lm_head": split_layer(head, "sparse", BaseConfig(), "lm_head")})
    save_split(model, tmp_path / "m")
    loaded = load_split(tmp_path / "m")
    assert_same_model(model, loaded)
    assert isinstance(loaded.lm_head, OrthoLinear)


def test_streams_with_nothing_in_them(same_bits, logits_of, new_model, tmp_path: Path) -> None:
    model = new_model()
    streams = {
        "model.layers.0.mlp.down_proj": LowRankOrtho(torch.zeros(24, 0), torch.zeros(0, 40)),
        "model.layers.1.mlp.down_proj": SparseOrtho.from_dense(
            torch.zeros(24, 40), torch.zeros(24, 40, dtype=torch.bool), torch.float16
        ),
        "model.layers.0.mlp.up_proj": None,
    }
    for name, ortho in streams.items():
        weight, _ = read_linear(model.get_submodule(name), name)
        install(model, {name: OrthoLinear.from_streams(quantize(weight), ortho)})
    save_split(model, tmp_path / "m")
    loaded = load_split(tmp_path / "m")
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
    assert same_bits(logits_of(model, 0.0), logits_of(loaded, 0.0))
    assert ortho_layers(loaded)["model.layers.0.mlp.up_proj"].ortho is None
    assert ortho_layers(loaded)["model.layers.0.mlp.up_proj"].report is None
    assert ortho_layers(loaded)["model.layers.0.mlp.down_proj"].ortho is not None


def test_generation_and_the_generation_config_survive(ids, split_model, tmp_path: Path) -> None:
    model = split_model()
    # Many published models carry settings like this one, which transformers refuses to save.
    model.generation_config.temperature = 0.6
    model.generation_config.max_new_tokens = 5
    save_split(model, tmp_path / "m")
    loaded = load_split(tmp_path / "m")
    assert loaded.generation_config.temperature == 0.6
    assert loaded.generation_config.max_new_tokens == 5
    set_alpha(loaded, 1.0)
    set_alpha(model, 1.0)
    args = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **args), loaded.generate(ids, **args))


def test_the_reports_survive(split_model, tmp_path: Path) -> None:
    model = split_model()
    report = dataclasses.replace(separation_report(model), forget_ppl={"0.0": float("inf")})
    save_split(model, tmp_path / "m", report=report)
    assert separation_report(load_split(tmp_path / "m")) == separation_report(model)
    written = json.loads((tmp_path / "m/report.json").read_text(), parse_constant=pytest.fail)
    assert written["forget_ppl"] == {"0.0": None}
    assert len(written["layers"]) == 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("{}", "layers=None: expected an array"),
        ('{"layers": [3]}', r"layers\[0\] is 3"),
        ('{"layers": [{"name": "x"}]}', r"'layers\[0\].method' is missing"),
    ],
)
def test_a_wrong_report(text: str, match: str, copy: Path) -> None:
    (copy / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"report\.json: .*{match}"):
        load_split(copy)


def test_a_report_with_an_integer_beyond_floats(copy: Path) -> None:
    report = json.loads((copy / "report.json").read_text())
    report["layers"][0]["base_error"] = 10**400
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=r"report\.json: .*base_error: .*too large"):
        load_split(copy)


def test_a_report_of_other_layers(copy: Path) -> None:
    path = copy / "report.json"
    path.write_text(path.read_text().replace("layers.1.mlp", "layers.7.mlp"))
    with pytest.raises(CheckpointError, match=r"layers\.7.*no such layer is split"):
        load_split(copy)


def test_without_a_report_it_loads(copy: Path) -> None:
    (copy / "report.json").unlink()
    assert separation_report(load_split(copy)).layers == ()


def test_a_model_of_several_dtypes(split_model, assert_same_model, tmp_path: Path) -> None:
    model = split_model("gemma").to(torch.bfloat16)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.float()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    save_split(model, tmp_path / "m")
    assert_same_model(model, load_split(tmp_path / "m"))


def test_loading_leaves_the_random_generator_alone(saved: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_split(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_changing_a_loaded_model_does_not_change_its_file(files_in, copy: Path) -> None:
    before = files_in(copy)
    model = load_split(copy)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert files_in(copy) == before


def test_a_loaded_model_can_be_saved_over_its_own_folder(assert_same_model, copy: Path) -> None:
    first = load_split(copy)
    save_split(first, copy)
    assert_same_model(first, load_split(copy))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_split(copy)


def test_not_a_folder(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_split(copy / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_split(copy / "config.json")


@pytest.mark.parametrize("sealed", [False, True])
def test_a_folder_that_is_replaced_while_it_is_loaded(
    split_model, sealed: bool, tmp_path: Path, monkeypatch
) -> None:
    """Another split of the same shapes takes its place between the check and the reading."""
    if sealed:
        pytest.importorskip("cryptography")
    key = OrthoKey(bytes(range(32))) if sealed else None
    save_split(split_model(), tmp_path / "m", key=key)
    save_split(split_model(seed=1), tmp_path / "other", key=key)
    prepare = integration.prepare

    def replaced(*arguments: Any) -> None:
        prepare(*arguments)
        (tmp_path / "m").rename(tmp_path / "old")
        (tmp_path / "other").rename(tmp_path / "m")

    monkeypatch.setattr(integration, "prepare", replaced)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: another .* load it again"):
        load_split(tmp_path / "m", key=key)
    monkeypatch.undo()
    load_split(tmp_path / "m", key=key)


def test_a_file_that_goes_while_it_is_loaded(copy: Path, monkeypatch) -> None:
    finish = integration.finish

    def gone(*arguments: Any) -> None:
        (copy / "ortho.safetensors").unlink()
        finish(*arguments)

    monkeypatch.setattr(integration, "finish", gone)
    with pytest.raises(CheckpointError, match=r"ortho\.safetensors: another file than when"):
        load_split(copy)
