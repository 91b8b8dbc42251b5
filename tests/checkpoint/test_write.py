"""Saving: what is in which file, a base without memory, and what is refused."""

from __future__ import annotations

import hashlib
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

from libortho import BaseConfig, CheckpointError, OrthoStreamMissing, alpha_scope, set_alpha
from libortho.alpha import ortho_layers
from libortho.checkpoint import base_only, load_split, read_manifest, save_split, verify_split
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
    base_only(tmp_path / "m", tmp_path / "b")
    for folder in ("m", "b"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert again.get_vocab() == words


def test_the_ortho_file_holds_the_memory_and_nothing_else_does(saved: Path) -> None:
    base, ortho = (set(load_file(saved / f"{x}.safetensors")) for x in ("base", "ortho"))
    assert {name.split(".ortho.")[1] for name in ortho} == {"crow", "col", "values"}
    assert not any("ortho" in name.split(".") for name in base)
    manifest = read_manifest(saved)
    assert set(manifest.tensors) == base
    assert list(manifest.layers) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    digest = hashlib.sha256((saved / "base.safetensors").read_bytes()).hexdigest()
    with safe_open(saved / "ortho.safetensors", "pt") as file:
        assert file.metadata()["base_sha256"] == manifest.base_sha256 == digest
    assert {p.name for p in saved.iterdir()} == {
        "base.safetensors",
        "config.json",
        "generation_config.json",
        "libortho.json",
        "ortho.safetensors",
    }


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions(split_model, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_split(split_model(), tmp_path / "m")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()}
    assert modes.pop("ortho.safetensors") == 0o600
    assert set(modes.values()) == {0o644}
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755


def test_base_only_has_no_memory(assert_same_model, files_in, saved: Path, tmp_path: Path) -> None:
    (spare := tmp_path / "with-spare", out := tmp_path / "out")
    shutil.copytree(saved, spare)
    shutil.copy(saved / "ortho.safetensors", spare / "spare.safetensors")
    base_only(spare, out)
    assert files_in(out) == {k: v for k, v in files_in(saved).items() if "ortho.safe" not in k}
    full, base = load_split(saved), load_split(out)
    assert_same_model(full, base, ortho=False)
    assert all(layer.ortho is None for layer in ortho_layers(base).values())
    with pytest.raises(OrthoStreamMissing):
        set_alpha(base, 0.5)
    with pytest.raises(OrthoStreamMissing), alpha_scope(base, 1.0):
        pass
    # The ortho file of the same split makes it whole again.
    shutil.copy(saved / "ortho.safetensors", out)
    assert_same_model(full, load_split(out))


def test_base_only_never_replaces_its_source(files_in, copy: Path, tmp_path: Path) -> None:
    before = files_in(copy)
    (tmp_path / "link").symlink_to(copy)
    inner = Path(shutil.copytree(copy, copy / "inner"))
    for source, out in ((copy, copy), (copy, tmp_path / "link"), (inner, copy)):
        with pytest.raises(ValueError, match="would replace"):
            base_only(source, out)
    shutil.rmtree(inner)
    assert files_in(copy) == before


def test_base_only_refuses_ortho_tensors_in_other_files(edit, copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "ortho.safetensors", copy / "extra.safetensors")
    edit(copy, lambda plain: plain["files"].append("extra.safetensors"))
    with pytest.raises(CheckpointError, match=r"extra\.safetensors.*ortho tensor"):
        base_only(copy, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_base_only_names_a_listed_file_that_is_missing(copy: Path, tmp_path: Path) -> None:
    (copy / "generation_config.json").unlink()
    load_split(copy)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is missing"):
        base_only(copy, tmp_path / "out")


def test_a_base_only_model_can_be_saved(assert_same_model, saved: Path, tmp_path: Path) -> None:
    base_only(saved, tmp_path / "b")
    save_split(load_split(tmp_path / "b"), tmp_path / "again")
    manifest = verify_split(tmp_path / "again")
    assert manifest.ortho_sha256 is None
    assert not (tmp_path / "again/ortho.safetensors").exists()
    assert_same_model(load_split(tmp_path / "b"), load_split(tmp_path / "again"), ortho=False)
    shutil.copy(saved / "ortho.safetensors", tmp_path / "again")
    with pytest.raises(CheckpointError, match="knows of no ortho stream"):
        load_split(tmp_path / "again")


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
