"""Models that accelerate has spread out: partly on disk, and over two devices that pretend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from libortho import (
    CurvatureConfig,
    GeometricConfig,
    SaliencyConfig,
    SeparationConfig,
    SpectralConfig,
    separate_,
)
from libortho.checkpoint import load_split, save_split
from libortho.devices import check_device_map, device_of, offloaded, weights_here
from libortho.evaluation.finetuned import load_model
from libortho.scoring import sequence_nll

pytest.importorskip("accelerate")

METHODS = {
    "descent": GeometricConfig(ortho_ratio=0.2, target_nll=5.0, find_steps=2, fit_steps=2),
    "projection": GeometricConfig(edit="projection", ortho_ratio=0.2, target_nll=5.0),
    "saliency": SaliencyConfig(ortho_ratio=0.1, target_nll=5.0, steps=2),
    "curvature": CurvatureConfig(ortho_ratio=0.2),
    "spectral": SpectralConfig(ortho_ratio=0.05),
}
PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
MAPS = {
    "a layer on disk": dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"},
    "all on disk": {"": "disk"},
}


@pytest.fixture
def model(tiny_llama, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def files(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "ortho.safetensors", "config.json", "ortho_config.json")
    return {name: (folder / name).read_bytes() for name in names}


def split(model: nn.Module, items: list[Any], method: Any) -> None:
    separate_(model, items[:3], items[3:], SeparationConfig(method, general_text=False))


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_is_partly_on_disk_gives_the_same_split(
    model: Path, tmp_path: Path, random_tokens, where: str, name: str
) -> None:
    items = random_tokens([12, 9, 14, 20, 17, 11, 23, 8])
    for label, device_map in (("whole", None), ("spread", MAPS[where])):
        loaded = load_model(str(model), device_map)
        assert any(p.is_meta for p in loaded.parameters()) is (label == "spread")
        split(loaded, items, METHODS[name])
        save_split(loaded, tmp_path / label, stored=offloaded(loaded))
    assert files(tmp_path / "whole") == files(tmp_path / "spread")


def test_a_failure_leaves_a_spread_model_as_it_was(model: Path, random_tokens, monkeypatch) -> None:
    items = random_tokens([12, 9, 14, 20])
    loaded = load_model(str(model), MAPS["a layer on disk"])
    before = torch.cat(sequence_nll(loaded, items))

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("libortho.separate._measure", fail)
    with pytest.raises(RuntimeError, match="no"):
        split(loaded, items, METHODS["projection"])
    assert torch.equal(torch.cat(sequence_nll(loaded, items)), before)


def test_a_rehearsal_needs_the_whole_earlier_model(model: Path, random_tokens) -> None:
    items = random_tokens([12, 9, 14, 20])
    before = load_model(str(model), MAPS["a layer on disk"])
    method = GeometricConfig(ortho_ratio=0.2)
    config = SeparationConfig(method, general_text=False)
    with pytest.raises(ValueError, match='not whole|rehearsal is a fine-tune.*earlier="show"'):
        separate_(load_model(str(model)), items[:2], items[2:], config, before=before)


def test_where_a_module_computes(model: Path) -> None:
    loaded = load_model(str(model), MAPS["a layer on disk"])
    layer = loaded.get_submodule("model.layers.1.mlp.down_proj")
    assert layer.weight.is_meta
    assert device_of(layer) == torch.device("cpu")
    with weights_here(layer):
        assert not layer.weight.is_meta
    assert layer.weight.is_meta
    assert "model.layers.1.mlp.down_proj.weight" in offloaded(loaded)
    assert offloaded(load_model(str(model))) == {}


def test_a_split_is_loaded_onto_devices(model: Path, tmp_path: Path, random_tokens) -> None:
    items = random_tokens([12, 9, 14, 20, 17])
    loaded = load_model(str(model))
    split(loaded, items, METHODS["projection"])
    save_split(loaded, tmp_path / "split")
    whole = load_split(tmp_path / "split")
    spread = load_split(tmp_path / "split", device_map="cpu")
    for one, other in zip(sequence_nll(whole, items), sequence_nll(spread, items), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto': give one"):
        load_split(tmp_path / "split", device="cpu", device_map="auto")


def test_names_of_device_maps() -> None:
    for name in ("auto", "balanced", "sequential", "cpu", "cuda:1"):
        assert check_device_map(name) == name
    with pytest.raises(ValueError, match="--device-map 'many': expected auto"):
        check_device_map("many")
