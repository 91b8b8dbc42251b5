"""The target peft, through PEFT itself: alpha 0, 1 and between, per adapter and per row."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libortho import BaseConfig, OrthoStreamMissing
from libortho.alpha import ortho_layers
from libortho.export import PeftExport, export_split
from libortho.ortho import LowRankOrtho, SparseOrtho
from libortho.serve.vllm_process import find_adapters

peft = pytest.importorskip("peft")

TARGETS = {
    "llama": ("down_proj", "o_proj"),
    "qwen2": ("q_proj", "down_proj", "lm_head"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
}


def with_adapters(base: Any, out: Path, **adapters: str) -> Any:
    """`with_adapters(base, out, full="ortho")`: name in PEFT = folder (PEFT's take no dot)."""
    names = list(adapters)
    model = peft.PeftModel.from_pretrained(base, out / adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(out / adapters[name], adapter_name=name)
    return model.eval()


@pytest.mark.parametrize("storage", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("family", TARGETS)
def test_lora(family, storage, families, split, logits, load, tmp_path: Path) -> None:
    config = BaseConfig(storage=storage, group_size=8 if storage == "int4" else None)
    model = split(families[family].build(), TARGETS[family], base=config)
    out = tmp_path / "out"
    report = export_split(model, out, PeftExport(alphas=(1.0, 0.3)))
    assert report.adapters == {"ortho": 1.0, "ortho-0.3": 0.3}
    assert "max_loras" in report.notes[0]
    assert report.weight_error == 0.0
    layers = ortho_layers(model)
    (empty,) = report.empty
    assert empty == list(layers)[1]
    assert report.max_rank == max(x.ortho.rank for x in layers.values())

    exported = with_adapters(load(out / "base"), out, full="ortho", some="ortho-0.3")
    near = {"atol": 5e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits(exported), logits(model, 1.0), **near)
    exported.set_adapter("some")
    torch.testing.assert_close(logits(exported), logits(model, 0.3), **near)
    with exported.disable_adapter():
        torch.testing.assert_close(logits(exported), logits(model, 0.0), **near)
    assert not torch.allclose(logits(model, 0.0), logits(model, 1.0), atol=0.1)

    loras = {
        name.removeprefix("base_model.model."): m
        for name, m in exported.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert set(loras) == set(layers) - {empty}
    for name, lora in loras.items():
        assert lora.scaling["full"] == 1.0
        assert lora.scaling["some"] == pytest.approx(0.3, rel=1e-12)
        assert lora.r["full"] == layers[name].ortho.rank


def test_one_alpha_per_row(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama())
    export_split(model, tmp_path / "out", PeftExport(alphas=(1.0, 0.5)))
    exported = with_adapters(
        load(tmp_path / "out" / "base"), tmp_path / "out", full="ortho", mid="ortho-0.5"
    )
    ids = torch.tensor([[1, 9, 3, 41]] * 3)
    with torch.no_grad():
        rows = exported(ids, adapter_names=["__base__", "full", "mid"]).logits
        for row, alpha in zip(rows, (0.0, 1.0, 0.5), strict=True):
            for layer in ortho_layers(model).values():
                layer.default_alpha = type(layer.default_alpha)((alpha,))
            torch.testing.assert_close(row, model(ids[:1]).logits[0], atol=5e-5, rtol=1e-5)


def test_a_bf16_model(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama().bfloat16())
    report = export_split(model, tmp_path / "out", PeftExport())
    base = load(tmp_path / "out" / "base", dtype="auto")
    assert base.dtype == torch.bfloat16
    assert 1e-4 < report.weight_error < 2.5e-3  # bf16 has 8 bits
    exported = with_adapters(base, tmp_path / "out", full="ortho")
    for alpha in (0.0, 1.0):
        wanted = logits(model, alpha)
        if alpha:
            found = logits(exported)
        else:
            with exported.disable_adapter():
                found = logits(exported)
        assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_no_alpha_is_rounded_in_a_name(split, tiny_llama, tmp_path: Path) -> None:
    alphas = (0.3333333, 0.33333331, 1e-7)
    report = export_split(split(tiny_llama()), tmp_path / "out", PeftExport(alphas=alphas))
    assert report.adapters == {
        "ortho-0.3333333": alphas[0],
        "ortho-0.33333331": alphas[1],
        "ortho-1e-07": alphas[2],
    }
    assert {alpha: p.name for alpha, p in find_adapters(tmp_path / "out").items()} == {
        alpha: name for name, alpha in report.adapters.items()
    }


def test_the_files(split, tiny_llama, tokenizer, read_json, tmp_path: Path) -> None:
    model = split(tiny_llama())
    out = tmp_path / "out"
    report = export_split(model, out, PeftExport(alphas=(1.0, 0.25)), tokenizer=tokenizer)
    assert sorted(p.name for p in out.iterdir()) == [
        "base", "libortho_export.json", "ortho", "ortho-0.25",
    ]  # fmt: skip
    written = read_json(out / "libortho_export.json")
    assert written.pop("libortho")
    assert written == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in report.to_dict().items()
    }
    assert (out / "base" / "tokenizer.json").is_file()
    weights = load_file(out / "base" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "ortho" in name]
    adapter = out / "ortho" / "adapter_model.safetensors"
    assert stat.S_IMODE(adapter.stat().st_mode) == 0o600
    # As stored, bit for bit; the scale is in the config alone.
    tensors = load_file(adapter)
    assert len(tensors) == 2 * (len(ortho_layers(model)) - 1)
    for name, layer in ortho_layers(model).items():
        if name not in report.empty:
            prefix = f"base_model.model.{name}"
            assert torch.equal(tensors[f"{prefix}.lora_A.weight"], layer.ortho.right)
            assert torch.equal(tensors[f"{prefix}.lora_B.weight"], layer.ortho.left)
    assert adapter.read_bytes() == (out / "ortho-0.25" / adapter.name).read_bytes()
    # vLLM before it knew rank_pattern took lora_alpha / r for every layer: so that must be alpha.
    config = read_json(out / "ortho-0.25" / "adapter_config.json")
    assert config["lora_alpha"] / config["r"] == 0.25
    assert config["r"] == report.max_rank


def test_base_alone(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama())
    for layer in ortho_layers(model).values():
        layer.ortho = None
    with pytest.raises(OrthoStreamMissing, match=r"o_proj has no ortho stream.*--base-only"):
        export_split(model, tmp_path / "out", PeftExport())
    assert not (tmp_path / "out").exists()
    report = export_split(model, tmp_path / "out", PeftExport(alphas=()))
    assert report.adapters == {}
    assert report.notes == ()
    assert report.max_rank is None
    torch.testing.assert_close(
        logits(load(tmp_path / "out" / "base")), logits(model, 0.0), atol=5e-5, rtol=1e-5
    )


def test_a_wrong_kind_of_ortho(split, tiny_llama, tmp_path: Path) -> None:
    model = split(tiny_llama(), kind="sparse")
    first = next(iter(ortho_layers(model).values()))
    first.ortho = LowRankOrtho(torch.ones(first.out_features, 1), torch.ones(1, first.in_features))
    with pytest.raises(ValueError, match="some ortho streams are sparse and some low-rank"):
        export_split(model, tmp_path / "out", PeftExport())
    for layer in ortho_layers(model).values():
        layer.ortho = LowRankOrtho(
            torch.zeros(layer.out_features, 0), torch.zeros(0, layer.in_features)
        )
    with pytest.raises(ValueError, match="every ortho stream is empty"):
        export_split(model, tmp_path / "out", PeftExport())


@pytest.mark.parametrize("alphas", [(0.0,), (1.2,), (0.5, 0.5)])
def test_alphas_are_checked(alphas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="alphas="):
        PeftExport(alphas=alphas)


# -- sparse ------------------------------------------------------------------------


def test_shira(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama(), kind="sparse")
    out = tmp_path / "out"
    report = export_split(model, out, PeftExport(alphas=(1.0, 0.5)))
    assert report.max_rank is None
    assert report.empty == (list(ortho_layers(model))[1],)
    assert "SHiRA" in report.notes[0]
    exported = with_adapters(load(out / "base"), out, full="ortho", mid="ortho-0.5")
    near = {"atol": 5e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits(exported), logits(model, 1.0), **near)
    exported.set_adapter("mid")
    torch.testing.assert_close(logits(exported), logits(model, 0.5), **near)
    with exported.disable_adapter():
        torch.testing.assert_close(logits(exported), logits(model, 0.0), **near)
    assert not torch.allclose(logits(model, 0.0), logits(model, 1.0), atol=0.05)
    # The added entries are at free places and zero.
    tensors = load_file(out / "ortho" / "adapter_model.safetensors")
    for name, layer in ortho_layers(model).items():
        if layer.ortho.numel:
            places = tensors[f"base_model.model.{name}.shira_indices"].long()
            values = tensors[f"base_model.model.{name}.shira_weight"]
            dense = torch.zeros(layer.ortho.shape).index_put(tuple(places), values)
            assert len(set(map(tuple, places.T.tolist()))) == places.shape[1]
            assert torch.equal(dense, layer.ortho.dense())


def test_shira_in_bf16(split, tiny_llama, logits, load, tmp_path: Path) -> None:
    model = split(tiny_llama().bfloat16(), kind="sparse")
    export_split(model, tmp_path / "out", PeftExport())
    base = load(tmp_path / "out" / "base", dtype="auto")
    exported = with_adapters(base, tmp_path / "out", full="ortho")
    wanted = logits(model, 1.0)
    assert float((logits(exported) - wanted).norm() / wanted.norm()) < 0.03


def test_shira_that_cannot_be(split, families, tiny_llama, tmp_path: Path) -> None:
    model = split(families["gpt2"].build(), ("mlp.c_proj",), kind="sparse")
    with pytest.raises(TypeError, match=r"c_proj is a Conv1D, which PEFT's SHiRA does not take"):
        export_split(model, tmp_path / "out", PeftExport())
    model = split(tiny_llama(), ("down_proj",), kind="sparse")
    layer = next(iter(ortho_layers(model).values()))
    mask = torch.ones(layer.ortho.shape, dtype=torch.bool)
    layer.ortho = SparseOrtho.from_dense(torch.randn(layer.ortho.shape), mask, torch.float16)
    with pytest.raises(ValueError, match="too dense for SHiRA"):
        export_split(model, tmp_path / "out", PeftExport())
