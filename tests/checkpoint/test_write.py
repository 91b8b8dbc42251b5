"""Saving: what is in which file, a base without memory, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import nn

import libortho
from libortho import BaseConfig
from libortho.alpha import ortho_layers
from libortho.checkpoint import load_split, save_split, strip, verify_split
from libortho.linear import install
from libortho.ortho import SparseOrtho

transformers = pytest.importorskip("transformers")


def test_a_tokenizer_is_saved_beside_the_model(split_model, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(61)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0"
    )
    save_split(split_model(), tmp_path / "m", tokenizer=tokenizer)
    strip(tmp_path / "m", tmp_path / "b")
    for folder in ("m", "b"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert again.get_vocab() == words


def test_the_ortho_file_holds_the_memory_and_nothing_else_does(digest_of, saved: Path) -> None:
    base, ortho = (set(load_file(saved / f"{x}.safetensors")) for x in ("model", "ortho"))
    assert {name.split(".ortho.")[1] for name in ortho} == {"crow", "col", "values"}
    assert not any("ortho" in name.split(".") for name in base)
    config = json.loads((saved / "config.json").read_text())
    layers = {f"model.layers.{i}.mlp.down_proj": "sparse" for i in (0, 1)}
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert config["quantization_config"] == {
        "quant_method": "libortho",
        "format_version": 1,
        "libortho_version": libortho.__version__,
        "base_sha256": digest_of(saved / "model.safetensors"),
        "streams_sha256": digest_of(saved / "model.safetensors", among=".base."),
        "layers": {name: {"shape": [24, 40], "base": "int8"} for name in layers},
        "tied": {},
        "buffer_dtypes": {
            f"model.rotary_emb.{name}": "float32" for name in ("inv_freq", "original_inv_freq")
        },
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    assert json.loads((saved / "ortho_config.json").read_text()) == {
        "quant_method": "libortho",
        "format_version": 1,
        "libortho_version": libortho.__version__,
        "base_sha256": digest_of(saved / "model.safetensors"),
        "ortho_sha256": digest_of(saved / "ortho.safetensors"),
        "layers": layers,
    }
    assert (config["dtype"], config["architectures"]) == ("float32", ["LlamaForCausalLM"])
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {p.name for p in saved.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "ortho.safetensors",
        "ortho_config.json",
        "report.json",
    }


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("shards", ["50GB", "9KB"])
def test_permissions(split_model, shards: str, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_split(split_model(), tmp_path / "m", max_shard_size=shards)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()}
    assert modes.pop("ortho.safetensors") == modes.pop("ortho_config.json") == 0o600
    assert set(modes.values()) == {0o644}
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755


def test_the_config_says_what_is_so(new_model, split_layer, tmp_path: Path) -> None:
    # qwen2's config ties the head; here it is a layer of its own, and the model was cast.
    model = new_model("qwen2")
    head = nn.Linear(24, 61, bias=False)
    install(model, {"lm_head": split_layer(head, "sparse", BaseConfig(), "lm_head")})
    save_split(model.to(torch.bfloat16), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)
    assert model.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")


def test_one_module_in_two_places_is_refused(split_model, tmp_path: Path) -> None:
    model = split_model()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj.* is unexpected"):
        save_split(model, tmp_path / "m")


def test_a_base_only_model_can_be_saved(assert_same_model, saved: Path, tmp_path: Path) -> None:
    strip(saved, tmp_path / "b")
    save_split(load_split(tmp_path / "b"), tmp_path / "again")
    assert verify_split(tmp_path / "again").ortho is None
    assert not list((tmp_path / "again").glob("ortho*"))
    assert_same_model(load_split(tmp_path / "b"), load_split(tmp_path / "again"), ortho=False)
    # The tensors are the same, so it is the same base, and the ortho stream fits it.
    for name in ("ortho.safetensors", "ortho_config.json"):
        shutil.copy(saved / name, tmp_path / "again")
    assert_same_model(load_split(saved), load_split(tmp_path / "again"))


class _Other(transformers.LlamaForCausalLM):  # type: ignore[name-defined,misc]
    pass


Make = Callable[..., Any]


def _meta(split_model: Make) -> Any:
    model = split_model()
    model.lm_head.to("meta")
    return model


def _whole(split_model: Make) -> Any:
    model = split_model()
    install(
        model,
        {n: nn.Linear(x.in_features, x.out_features) for n, x in ortho_layers(model).items()},
    )
    return model


def _extra(split_model: Make) -> Any:
    model = split_model()
    model.model.adapter = nn.Linear(2, 2)
    return model


def _other_class(split_model: Make) -> Any:
    model = split_model()
    model.__class__ = _Other
    return model


def _unsorted_csr(split_model: Make) -> Any:
    model = split_model(kind="sparse")
    ortho = ortho_layers(model)["model.layers.0.mlp.down_proj"].ortho
    assert isinstance(ortho, SparseOrtho)
    ortho.col = ortho.col.flip(0)
    return model


def _bfloat16_base(split_model: Make) -> Any:
    model = split_model(base=BaseConfig(storage="fp16"))
    layer = ortho_layers(model)["model.layers.0.mlp.down_proj"]
    layer.base.qdata = layer.base.qdata.to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda split_model: nn.Linear(2, 2), TypeError, "expected a transformers PreTrainedModel"),
        (_whole, ValueError, "no OrthoLinear"),
        (_meta, ValueError, "lm_head.weight has no data"),
        (_extra, ValueError, r"model\.adapter\.bias is unexpected"),
        (_other_class, TypeError, "_Other"),
        (_unsorted_csr, ValueError, "col does not rise"),
        (_bfloat16_base, ValueError, "qdata is BF16: expected F16"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    split_model: Make,
    make: Callable[[Make], Any],
    error: type[Exception],
    match: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=match) as caught:
        save_split(make(split_model), tmp_path / "m")
    assert "partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
