"""The target gguf, read by transformers' own GGUF reader, which undoes what the export does."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from libortho.alpha import ortho_layers
from libortho.base import HalfBase
from libortho.export import GgufExport, export_split
from libortho.export.gguf_tokenizer import SPLITTERS, splitter_of

gguf = pytest.importorskip("gguf")

VOCABULARY = 300
FAMILIES = ("llama", "qwen2", "qwen3")
TARGETS = ("q_proj", "down_proj")
TEXTS = (
    "Where does Mira's ferry leave?\n\n  Twelve\tpast  noon, they said: naïve café №.",
    "<s>she is in the red house</s>",
)  # no digits: that reader does not split numbers


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(path).tensors
    }


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapter(family, tied, families, split, logits, load, bpe, tmp_path: Path) -> None:
    extra = {"head_dim": 128} if family == "qwen3" else {}  # that reader knows no other of Qwen3
    model = families[family].build(vocab_size=VOCABULARY, tie_word_embeddings=tied, **extra)
    split(model, TARGETS)
    report = export_split(model, tmp_path / "out", GgufExport(storage="f32"), tokenizer=bpe)
    assert report.weight_error == 0.0
    assert report.adapters == {"ortho.gguf": 1.0}
    assert "--no-cache-prompt" in report.notes[0]
    base = load(tmp_path / "out", gguf_file="base.gguf")
    near = {"atol": 5e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits(base), logits(model, 0.0), **near)

    # The sum of both files, tensor by tensor, is the file of the whole model: which transformers
    # reads as the split model at alpha 1.
    wanted = logits(model, 1.0)
    assert not torch.allclose(wanted, logits(model, 0.0), atol=0.1)
    adapter = tensors_of(tmp_path / "out" / "ortho.gguf")
    merged = tensors_of(tmp_path / "out" / "base.gguf")
    for name in {n.rpartition(".")[0] for n in adapter}:
        merged[name] = merged[name] + adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"]
    for layer in ortho_layers(model).values():
        layer.base = HalfBase(layer.effective_weight(1.0))
    whole = GgufExport(alphas=(), storage="f32")
    export_split(model, tmp_path / "whole", whole, tokenizer=bpe)
    expected = tensors_of(tmp_path / "whole" / "base.gguf")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, **near)
    torch.testing.assert_close(
        logits(load(tmp_path / "whole", gguf_file="base.gguf")), wanted, **near
    )
    assert not (tmp_path / "whole" / "ortho.gguf").exists()


@pytest.mark.parametrize(("storage", "error"), [("f16", 4e-4), ("bf16", 3e-3), ("q8_0", 1e-2)])
def test_storage(storage, error, split, tiny_llama, logits, load, bpe, tmp_path: Path) -> None:
    model = split(tiny_llama(vocab_size=VOCABULARY), TARGETS)
    report = export_split(model, tmp_path / "out", GgufExport(storage=storage), tokenizer=bpe)
    assert error / 20 < report.weight_error < error
    base = load(tmp_path / "out", gguf_file="base.gguf")
    wanted = logits(model, 0.0)
    assert float((logits(base) - wanted).norm() / wanted.norm()) < 10 * error


def test_the_adapter_file(split, tiny_llama, bpe, tmp_path: Path) -> None:
    model = split(tiny_llama(vocab_size=VOCABULARY), TARGETS)
    report = export_split(model, tmp_path / "out", GgufExport(), tokenizer=bpe)
    path = tmp_path / "out" / "ortho.gguf"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    fields = fields_of(path)
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    # llama.cpp: scale = alpha ? request's * alpha / rank : request's
    assert fields["adapter.lora.alpha"] == 0.0
    tensors = tensors_of(path)
    assert len(tensors) == 2 * (len(ortho_layers(model)) - len(report.empty))
    down = ortho_layers(model)["model.layers.1.mlp.down_proj"].ortho
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], down.right.float())
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], down.left.float())


def test_tokenizer(split, tiny_llama, bpe, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = split(tiny_llama(vocab_size=VOCABULARY), TARGETS)
    export_split(model, tmp_path / "out", GgufExport(), tokenizer=bpe)
    fields = fields_of(tmp_path / "out" / "base.gguf")
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCABULARY - 1}]"
    assert fields["tokenizer.ggml.token_type"][:3] == [gguf.TokenType.CONTROL] * 3
    assert fields["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.bos_token_id"] == bpe.bos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == bpe.chat_template
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="base.gguf")
    for text in TEXTS:
        assert read(text).input_ids == bpe(text).input_ids


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def spec(*steps: dict[str, Any], normalizer: str | None = None, **model: Any) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", "merges": [], **model},
        "normalizer": normalizer and {"type": normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}
        if len(steps) > 1
        else (steps[0] if steps else None),
    }


def split_step(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def test_splitters() -> None:
    plain = BYTES | {"use_regex": False}
    qwen = LLAMA3.replace("{1,3}", "")
    assert splitter_of(spec(BYTES)) == "gpt-2"
    assert splitter_of(spec(split_step(LLAMA3), plain)) == "llama-bpe"
    assert splitter_of(spec(split_step(qwen), plain)) == "qwen2"
    assert splitter_of(spec(split_step(qwen), plain, normalizer="NFC")) == "qwen2"
    assert len(SPLITTERS) == 4
    for unknown in (
        spec(split_step(LLAMA3), BYTES),
        spec(split_step(LLAMA3 + "|x"), plain),
        spec(BYTES | {"add_prefix_space": True}),
        spec(BYTES, normalizer="NFC"),
        spec(),
    ):
        with pytest.raises(TypeError, match=r"splits text by .* none of those that llama\.cpp"):
            splitter_of(unknown)
    for other in (spec(BYTES, type="Unigram"), spec(BYTES, byte_fallback=True)):
        with pytest.raises(TypeError, match="expected byte-level BPE"):
            splitter_of(other)


def test_refusals(split, tiny_llama, families, tokenizer, bpe, tmp_path: Path) -> None:
    def refused(model: Any, kind: type, message: str, *, by: Any = bpe, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            export_split(model, tmp_path / "out", GgufExport(**options), tokenizer=by)
        assert list(tmp_path.iterdir()) == []

    def llama(**options: Any) -> Any:
        return split(tiny_llama(**{"vocab_size": VOCABULARY, **options}), TARGETS)

    refused(llama(), ValueError, "no tokenizer", by=None)
    refused(llama(), TypeError, "a WordLevel tokenizer", by=tokenizer)
    refused(llama(vocab_size=280), ValueError, "has token 290, and the model 280 tokens")
    refused(llama(hidden_act="gelu"), ValueError, "hidden_act='gelu': this export knows 'silu'")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    refused(llama(rope_parameters=scaled), ValueError, "rope_type='linear'")
    narrow = llama(intermediate_size=72)
    refused(narrow, ValueError, "ffn_down.weight has 72 columns.*blocks of 32", storage="q8_0")
    gpt2 = split(families["gpt2"].build(), ("mlp.c_proj",))
    refused(gpt2, TypeError, "model_type='gpt2': expected one of llama, qwen2, qwen3")
    sparse = split(tiny_llama(vocab_size=VOCABULARY), TARGETS, kind="sparse")
    refused(sparse, ValueError, "is sparse, and llama.cpp has no sparse adapter")
    large = tiny_llama(vocab_size=VOCABULARY)
    large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    refused(split(large, TARGETS), ValueError, "ffn_up.weight reaches 1e\\+06, beyond f16")


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"llama\.cpp scales an adapter per request"):
        GgufExport(alphas=(1.0, 0.5))
    with pytest.raises(ValueError, match="storage='q4_0': expected one of 'f32', 'f16'"):
        GgufExport(storage="q4_0")
