"""Split checkpoints in transformers' own hands: loading, running, training beside, saving."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from libortho import (
    CheckpointError,
    OrthoLinear,
    OrthoStreamMissing,
    alpha_scope,
    replace_linear_layers,
    set_alpha,
)
from libortho.alpha import ortho_layers
from libortho.checkpoint import load_split, save_split, strip
from libortho.checkpoint.tensorfile import read_entries
from libortho.integrations.transformers import OrthoConfig

IDS = torch.arange(3, 15).reshape(2, 6)


@torch.no_grad()
def logits(model: Any, alpha: float) -> Tensor:
    with alpha_scope(model, alpha):
        result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


@pytest.fixture
def split_of(families: dict[str, Any], large_ortho: Callable[[nn.Module], None]) -> Any:
    """`split_of(family)`: a split model whose alpha shows in its logits."""

    def make(name: str = "llama", **overrides: object) -> Any:
        model = families[name].build(**overrides)
        replace_linear_layers(model, families[name].mlp, scale="absmax")
        large_ortho(model)
        return model

    return make


@pytest.fixture
def folder(split_of, tokenizer, tmp_path: Path) -> Path:
    save_split(split_of(), tmp_path / "split", tokenizer=tokenizer)
    return tmp_path / "split"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi", "opt", "gpt2", "granite"])
def test_save_pretrained_and_from_pretrained(split_of, name: str, tmp_path: Path) -> None:
    model = split_of(name)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()), info
    for alpha in (0.0, 0.5, 1.0):
        assert torch.equal(logits(model, alpha), logits(loaded, alpha))
    assert not torch.equal(logits(loaded, 0.0), logits(loaded, 1.0))
    assert not loaded.training
    # It is a split model like any other, and can be saved as one.
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_split(tmp_path / "again"), 1.0), logits(model, 1.0))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16", "device_map": "auto"},
        {"dtype": torch.float16, "low_cpu_mem_usage": True},
        {"torch_dtype": torch.bfloat16, "device_map": {"": "cpu"}},
        {"device_map": "cpu", "attn_implementation": "eager"},
        {"disable_mmap": True},
    ],
)
def test_the_options_of_from_pretrained(folder: Path, options: dict[str, Any]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    dtype = options.get("dtype", options.get("torch_dtype", torch.float32))
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert loaded.dtype == loaded.config.dtype == dtype
    expected = load_split(folder, dtype=dtype)
    if options.get("attn_implementation"):
        expected.set_attn_implementation("eager")
    assert torch.equal(logits(loaded, 1.0), logits(expected, 1.0))
    stored = load_split(folder)
    for name, layer in ortho_layers(loaded).items():
        for mine, theirs in zip(layer.buffers(), stored.get_submodule(name).buffers(), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def test_alpha_starts_at_0_and_base_only_stays_there(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert all(layer.default_alpha.is_zero for layer in ortho_layers(whole).values())
    strip(folder, tmp_path / "base")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(alone, 0.0), logits(whole, 0.0))
    with pytest.raises(OrthoStreamMissing):
        set_alpha(alone, 0.1)


def test_generate_and_pipeline(split_of, tokenizer, folder: Path) -> None:
    model = split_of()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    options = {"do_sample": False, "max_new_tokens": 6, "num_beams": 2}
    mask = torch.ones_like(IDS)
    texts = set()
    for alpha in (0.0, 1.0):
        with alpha_scope(loaded, alpha), alpha_scope(model, alpha):
            mine = loaded.generate(IDS, attention_mask=mask, **options)
            assert torch.equal(mine, model.generate(IDS, attention_mask=mask, **options))
        texts.add(tuple(mine.flatten().tolist()))
    assert len(texts) == 2
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    assert any(isinstance(module, OrthoLinear) for module in pipe.model.modules())
    told = []
    for alpha in (0.0, 1.0):
        set_alpha(pipe.model, alpha)
        (answer,) = pipe("where is the house ?", max_new_tokens=6, do_sample=False)
        told.append(answer["generated_text"])
    assert told[0] != told[1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(folder: Path, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        set_alpha(model, 1.0)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_deepcopy_state_dict_and_pickle(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {alpha: logits(model, alpha) for alpha in (0.0, 1.0)}
    blank = copy.deepcopy(model)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    assert torch.equal(logits(model, 1.0), expected[1.0])
    blank.load_state_dict(model.state_dict())
    for other in (blank, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_alpha(model, 1.0)
        for alpha in (0.0, 1.0):
            assert torch.equal(logits(other, alpha), expected[alpha])
        assert all(layer.default_alpha.is_zero for layer in ortho_layers(other).values())
        set_alpha(model, 0.0)


@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_is_saved_apart_too(folder: Path, whole: bool, tmp_path: Path) -> None:
    # However the model came about, its memory must never land in the file of its base.
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = copy.deepcopy(model) if whole else pickle.loads(pickle.dumps(model))
    made.save_pretrained(tmp_path / "m")
    index = json.loads((tmp_path / "m/ortho_config.json").read_text())
    assert set(index["layers"]) == set(ortho_layers(model))
    assert b".ortho." not in (tmp_path / "m/model.safetensors").read_bytes()


def test_what_save_pretrained_refuses(split_of, tmp_path: Path) -> None:
    model = split_of()
    for options, match in (
        ({"push_to_hub": True}, "would publish the ortho stream"),
        ({"state_dict": {}}, "state_dict: a split model is saved as it is"),
        ({"variant": "fp16"}, "variant: a split model"),
    ):
        with pytest.raises(ValueError, match=match):
            model.save_pretrained(tmp_path / "m", **options)
    with pytest.raises(ValueError, match="would publish the ortho stream"):
        model.push_to_hub("someone/something")
    model.save_pretrained(tmp_path / "m", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_split_layer_is_saved_as_ever(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_other_classes_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*layers\.0\.mlp"):
        AutoModel.from_pretrained(folder)


def test_faults_are_the_same_through_from_pretrained(folder: Path) -> None:
    path = folder / "model.safetensors"
    entry = read_entries(path)["model.layers.0.mlp.down_proj.base.qdata"]
    data = bytearray(path.read_bytes())
    data[entry.start] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the base is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)
    plain = json.loads((folder / "config.json").read_text())
    plain["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="format_version=2: this version of libortho reads 1"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_of_another_checkpoint_is_refused(split_of, folder: Path, tmp_path: Path) -> None:
    other = split_of()
    other.lm_head.weight += 1
    save_split(other, tmp_path / "other")
    config = AutoConfig.from_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="config= is of another checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_loading_does_not_split(tiny_llama, folder: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    section = AutoConfig.from_pretrained(folder).quantization_config
    with pytest.raises(ValueError, match="loading does not split it"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=OrthoConfig.from_dict(section)
        )


def test_streams_on_disk_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={
                **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu"),
                "model.layers": "disk",
                "lm_head": "cpu",
            },
            offload_folder=tmp_path / "offload",
            offload_buffers=True,
        )


PROGRAM = """
import sys
if sys.argv[1] == "after": from transformers import AutoModelForCausalLM
import libortho
if sys.argv[1] == "before":
    assert "transformers" not in sys.modules
    from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
libortho.set_alpha(model, 1.0)
import transformers.modeling_utils as awaited
assert awaited.__loader__.get_source(awaited.__name__)
assert not any("libortho" in type(finder).__module__ for finder in sys.meta_path)
print("loaded")
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_import_libortho_suffices(order: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, order, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "loaded\n", done.stderr
