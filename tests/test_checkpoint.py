"""Checkpoints: bit for bit there and back, all or nothing on disk, and never half understood."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from libortho import (
    BaseConfig,
    CheckpointError,
    OrthoLinear,
    OrthoStreamMissing,
    SpectralConfig,
    alpha_scope,
    separation_report,
    set_alpha,
)
from libortho.alpha import ortho_layers
from libortho.base import quantize
from libortho.checkpoint import (
    atomic,
    base_only,
    check_writable,
    is_split,
    load_split,
    read_manifest,
    save_split,
    verify_split,
    write,
)
from libortho.linear import install, read_linear, select_linear
from libortho.methods.spectral import split_spectral
from libortho.ortho import LowRankOrtho, SparseOrtho
from libortho.report import Split, measure_layer

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=61,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )


def _opt() -> Any:
    plain = {k: v for k, v in COMMON.items() if k != "intermediate_size"}
    return transformers.OPTConfig(**plain, ffn_dim=40, word_embed_proj_dim=24)


# Family -> (config, target modules). Between them: tied and untied embeddings, biases, Conv1D,
# rotary buffers plain and scaled, and a computed embedding scale.
FAMILIES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama": (lambda: transformers.LlamaConfig(**GROUPED), ("down_proj",)),
    "llama-rope": (
        lambda: transformers.LlamaConfig(
            **GROUPED, rope_parameters=SCALED_ROPE, tie_word_embeddings=True
        ),
        ("down_proj", "q_proj"),
    ),
    "qwen2": (
        lambda: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
        ("q_proj", "down_proj"),
    ),
    "gpt2": (_gpt2, ("c_attn", "mlp.c_proj")),
    "opt": (_opt, ("fc2", "k_proj")),
    "gemma": (lambda: transformers.GemmaConfig(**GROUPED, head_dim=6), ("down_proj",)),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=6), ("gate_proj",)),
    "mixtral": (
        lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=2),
        ("o_proj",),
    ),
}
BASES = {
    "fp16": BaseConfig(storage="fp16"),
    "int8": BaseConfig(storage="int8"),
    "grouped": BaseConfig(storage="int8", group_size=8),
    "int4": BaseConfig(storage="int4", group_size=8),
}
IDS = torch.tensor([[5, 9, 3, 41, 17, 22, 8, 60], [1, 7, 7, 30, 2, 11, 59, 4]])


def new_model(family: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][0]())
    for parameter in model.parameters():
        # Biases and norms start at 0 and 1: shaken, so that a lost one shows.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def split_layer(module: nn.Module, kind: str, base: BaseConfig, name: str = "") -> OrthoLinear:
    weight, bias = read_linear(module, name)
    if kind == "sparse":
        split = split_spectral(weight, SpectralConfig(ortho_ratio=0.05, base=base))
    else:
        left, right = torch.randn(weight.shape[0], 3), torch.randn(3, weight.shape[1])
        ortho = LowRankOrtho.from_factors(left, right, torch.bfloat16)
        split = Split(quantize(weight - ortho.dense(), base), ortho)
    report = measure_layer(name, "test", weight, split, note="made for a test")
    return OrthoLinear.from_streams(split.base, split.ortho, bias, report)


def split_model(
    family: str = "llama",
    kind: str = "low_rank",
    base: BaseConfig | None = None,
    seed: int = 0,
) -> Any:
    model = new_model(family, seed)
    targets = select_linear(model, FAMILIES[family][1])
    config = base or BaseConfig()
    install(model, {n: split_layer(m, kind, config, n) for n, m in targets.items()})
    return model


@torch.no_grad()
def logits(model: Any, alpha: float) -> torch.Tensor:
    with alpha_scope(model, alpha):
        return model(IDS).logits


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def assert_same_model(a: Any, b: Any, *, ortho: bool = True) -> None:
    """Every tensor, stored or computed, and the logits at both ends of alpha."""
    first, second = ({**m.state_dict(), **dict(m.named_buffers())} for m in (a, b))
    if not ortho:
        first = {name: t for name, t in first.items() if ".ortho." not in name}
    assert first.keys() == second.keys()
    differing = [name for name in first if not same_bits(first[name], second[name])]
    assert differing == []
    for alpha in (0.0, 1.0) if ortho else (0.0,):
        assert same_bits(logits(a, alpha), logits(b, alpha))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    save_split(split_model(kind="sparse"), folder)
    return folder


@pytest.fixture(scope="module")
def saved_low_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    save_split(split_model(kind="low_rank"), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    model = split_model(family, kind)
    save_split(model, tmp_path / "m")
    loaded = load_split(tmp_path / "m")
    assert type(loaded) is type(model)
    assert_same_model(model, loaded)
    assert not same_bits(logits(loaded, 0.0), logits(loaded, 1.0))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(layer.default_alpha.is_zero for layer in ortho_layers(loaded).values())


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
@pytest.mark.parametrize("base", BASES)
def test_every_base_storage(base: str, kind: str, tmp_path: Path) -> None:
    model = split_model("opt", kind, BASES[base])
    save_split(model, tmp_path / "m")
    assert_same_model(model, load_split(tmp_path / "m"))
    entry = next(iter(read_manifest(tmp_path / "m").layers.values()))
    assert (entry.base, entry.ortho) == (BASES[base].storage, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    # .to() casts computed buffers too (rotary frequencies), which the config alone cannot tell.
    model = split_model("gemma").to(dtype)
    assert model.model.rotary_emb.inv_freq.dtype == dtype
    save_split(model, tmp_path / "m")
    assert_same_model(model, load_split(tmp_path / "m"))


def test_a_model_built_in_bfloat16(tmp_path: Path) -> None:
    config = FAMILIES["gemma3"][0]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    targets = select_linear(model, "down_proj")
    install(model, {n: split_layer(m, "sparse", BaseConfig(), n) for n, m in targets.items()})
    save_split(model, tmp_path / "m")
    assert_same_model(model, load_split(tmp_path / "m"))


def test_dtype_casts_all_but_the_streams(saved: Path) -> None:
    plain, cast = load_split(saved), load_split(saved, dtype=torch.bfloat16)
    assert cast.dtype == cast.config.dtype == torch.bfloat16
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, parameter in cast.named_parameters():
        assert same_bits(parameter, plain.get_parameter(name).to(torch.bfloat16))
    for name, layer in ortho_layers(cast).items():
        for stored, other in zip(layer.buffers(), plain.get_submodule(name).buffers(), strict=True):
            assert same_bits(stored, other)
    assert logits(cast, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_dtype_must_be_floating(saved: Path, dtype: Any) -> None:
    with pytest.raises(TypeError, match="floating"):
        load_split(saved, dtype=dtype)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model = split_model("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_split(model, tmp_path / "m")
    names = set(load_file(tmp_path / "m/base.safetensors"))
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    loaded = load_split(tmp_path / "m", dtype=torch.float16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_split_lm_head_that_was_untied_stays_split(tmp_path: Path) -> None:
    # The config still says "tied"; what was saved decides.
    model = new_model("qwen2")
    head = nn.Linear(24, 61, bias=False)
    install(model, {"lm_head": split_layer(head, "sparse", BaseConfig(), "lm_head")})
    save_split(model, tmp_path / "m")
    loaded = load_split(tmp_path / "m")
    assert_same_model(model, loaded)
    assert isinstance(loaded.lm_head, OrthoLinear)


def test_streams_with_nothing_in_them(tmp_path: Path) -> None:
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
    assert_same_model_at_zero(model, loaded)
    assert ortho_layers(loaded)["model.layers.0.mlp.up_proj"].ortho is None
    assert ortho_layers(loaded)["model.layers.0.mlp.up_proj"].report is None
    assert ortho_layers(loaded)["model.layers.0.mlp.down_proj"].ortho is not None


def assert_same_model_at_zero(a: Any, b: Any) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
    assert same_bits(logits(a, 0.0), logits(b, 0.0))


def test_generation_and_the_generation_config_survive(tmp_path: Path) -> None:
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
    args = {"do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **args), loaded.generate(IDS, **args))


def test_the_reports_survive(tmp_path: Path) -> None:
    model = split_model()
    report = dataclasses.replace(separation_report(model), forget_ppl={"0.0": float("inf")})
    save_split(model, tmp_path / "m", report=report)
    assert separation_report(load_split(tmp_path / "m")) == separation_report(model)
    written = json.loads((tmp_path / "m/report.json").read_text(), parse_constant=pytest.fail)
    assert written["forget_ppl"] == {"0.0": None}
    assert len(written["layers"]) == 2


def test_a_tokenizer_is_saved_beside_the_model(tmp_path: Path) -> None:
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


def test_loading_leaves_the_random_generator_alone(saved: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_split(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_changing_a_loaded_model_does_not_change_its_file(copy: Path) -> None:
    before = snapshot(copy)
    model = load_split(copy)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert snapshot(copy) == before


def test_a_loaded_model_can_be_saved_over_its_own_folder(copy: Path) -> None:
    first = load_split(copy)
    save_split(first, copy)
    assert_same_model(first, load_split(copy))


# --- what is where -------------------------------------------------------------------------------


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
def test_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_split(split_model(), tmp_path / "m")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()}
    assert modes.pop("ortho.safetensors") == 0o600
    assert set(modes.values()) == {0o644}
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755


def test_base_only_has_no_memory(saved: Path, tmp_path: Path) -> None:
    (spare := tmp_path / "with-spare", out := tmp_path / "out")
    shutil.copytree(saved, spare)
    shutil.copy(saved / "ortho.safetensors", spare / "spare.safetensors")
    base_only(spare, out)
    assert snapshot(out) == {k: v for k, v in snapshot(saved).items() if "ortho.safe" not in k}
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


def test_base_only_never_replaces_its_source(copy: Path, tmp_path: Path) -> None:
    before = snapshot(copy)
    (tmp_path / "link").symlink_to(copy)
    inner = Path(shutil.copytree(copy, copy / "inner"))
    for source, out in ((copy, copy), (copy, tmp_path / "link"), (inner, copy)):
        with pytest.raises(ValueError, match="would replace"):
            base_only(source, out)
    shutil.rmtree(inner)
    assert snapshot(copy) == before


def test_base_only_refuses_ortho_tensors_in_other_files(copy: Path, tmp_path: Path) -> None:
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


def test_a_base_only_model_can_be_saved(saved: Path, tmp_path: Path) -> None:
    base_only(saved, tmp_path / "b")
    save_split(load_split(tmp_path / "b"), tmp_path / "again")
    manifest = verify_split(tmp_path / "again")
    assert manifest.ortho_sha256 is None
    assert not (tmp_path / "again/ortho.safetensors").exists()
    assert_same_model(load_split(tmp_path / "b"), load_split(tmp_path / "again"), ortho=False)
    shutil.copy(saved / "ortho.safetensors", tmp_path / "again")
    with pytest.raises(CheckpointError, match="knows of no ortho stream"):
        load_split(tmp_path / "again")


def test_is_split(saved: Path, tmp_path: Path) -> None:
    assert is_split(saved)
    assert is_split(str(saved))
    assert not is_split(tmp_path)
    assert not is_split(tmp_path / "nowhere")


# --- what cannot be saved ------------------------------------------------------------------------


class _Other(transformers.LlamaForCausalLM):  # type: ignore[name-defined,misc]
    pass


def _meta() -> Any:
    model = split_model()
    model.lm_head.to("meta")
    return model


def _extra() -> Any:
    model = split_model()
    model.model.adapter = nn.Linear(2, 2)
    return model


def _other_class() -> Any:
    model = split_model()
    model.__class__ = _Other
    return model


def _unsorted_csr() -> Any:
    model = split_model(kind="sparse")
    ortho = ortho_layers(model)["model.layers.0.mlp.down_proj"].ortho
    assert isinstance(ortho, SparseOrtho)
    ortho.col = ortho.col.flip(0)
    return model


def _bfloat16_base() -> Any:
    model = split_model(base=BASES["fp16"])
    layer = ortho_layers(model)["model.layers.0.mlp.down_proj"]
    layer.base.qdata = layer.base.qdata.to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "expected a transformers PreTrainedModel"),
        (new_model, ValueError, "no OrthoLinear"),
        (_meta, ValueError, "lm_head.weight has no data"),
        (_extra, ValueError, r"model\.adapter\.bias is unexpected"),
        (_other_class, TypeError, "_Other"),
        (_unsorted_csr, ValueError, "col does not rise"),
        (_bfloat16_base, ValueError, "qdata is BF16: expected F16"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    make: Callable[[], Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match) as caught:
        save_split(make(), tmp_path / "m")
    assert "partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- errors on loading ---------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "libortho.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def rewrite(
    folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str
) -> None:
    """Change tensors, and make every digest right again, so that the digests find nothing."""
    path = folder / f"{file}.safetensors"
    with safe_open(path, "pt") as opened:
        old = dict(opened.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, old | metadata)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda plain: plain.update({f"{file}_sha256": digest}))
    if file == "base" and "base_sha256" not in metadata and (folder / "ortho.safetensors").exists():
        rewrite(folder, "ortho", lambda tensors: None, base_sha256=digest)


LAYER = "model.layers.0.mlp.down_proj"


def entry(plain: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = plain["layers"][LAYER]
    return result


MANIFEST_ERRORS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(format="pickle"), "format='libortho-split'"),
    (lambda m: m.update(format_version=2), "format_version=2: this version of libortho reads 1"),
    (lambda m: m.update(format_version=True), "format_version=True"),
    (lambda m: m.pop("format_version"), "format_version=None"),
    (lambda m: m.update(surprise=1), "unknown key 'surprise'"),
    (lambda m: entry(m).update(surprise=1), f"unknown key 'layers.{LAYER}.surprise'"),
    (lambda m: entry(m)["report"].update(x=1), f"unknown key 'layers.{LAYER}.report.x'"),
    (lambda m: entry(m)["report"].update(rank=1.5), r"report.rank=1.5: expected int"),
    (lambda m: entry(m)["report"].update(seconds="long"), "report.seconds='long': expected float"),
    (lambda m: m.pop("base_sha256"), "key 'base_sha256' is missing"),
    (lambda m: m.update(base_sha256="abc"), "64 hexadecimal digits"),
    (lambda m: m.update(base_sha256=7), "base_sha256=7: expected str"),
    (lambda m: m.update(ortho_sha256=None), "one is there, one is not"),
    (lambda m: m.update(layers={}), "layers is empty"),
    (lambda m: m.update(layers=[]), r"layers=\[\]: expected dict"),
    (lambda m: m["layers"].update({LAYER: 3}), "is 3: expected an object"),
    (lambda m: entry(m).update(shape=[24]), r"shape=\[24\]"),
    (lambda m: entry(m).update(shape=[24, 40.0]), r"shape\[1\]=40.0: expected int"),
    (lambda m: entry(m).update(shape=[24, 0]), "above 0"),
    (lambda m: entry(m).update(shape=[25, 40]), r"base.qdata is \[24, 40\]: expected \[25, 40\]"),
    (lambda m: entry(m).update(base="int3"), "base='int3': expected Literal"),
    (lambda m: entry(m).update(base="fp16"), "base.scale does not belong"),
    (lambda m: entry(m).update(ortho="dense"), "ortho='dense'"),
    (lambda m: entry(m).update(ortho="low_rank"), "ortho.left is missing"),
    (lambda m: m["tensors"].pop("lm_head.weight"), "lm_head.weight is unexpected"),
    (lambda m: m["tensors"]["lm_head.weight"].update(dtype="F16"), r"F32 \[61, 24\].*says F16"),
    (lambda m: m["tensors"]["lm_head.weight"].update(shape=[1]), r"F32 \[61, 24\].*says F32 \[1\]"),
    (lambda m: m["tied"].update(a="b"), "tied.a='b'"),
    (lambda m: m["buffer_dtypes"].update(x="int8"), "buffer_dtypes.x='int8'"),
    (lambda m: m["files"].append("../secrets"), "inside the folder"),
    (lambda m: m["files"].append("/etc/passwd"), "inside the folder"),
    (lambda m: m["files"].append("sub/ortho.safetensors"), "not listed there"),
]


@pytest.mark.parametrize(("change", "match"), MANIFEST_ERRORS)
def test_a_wrong_manifest(
    change: Callable[[dict[str, Any]], Any],
    match: str,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_building(monkeypatch)
    edit(copy, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_split(copy)
    assert str(copy) in str(caught.value)


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a model was built before the checkpoint was found wanting")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"format": "libortho-split"'])
def test_a_manifest_that_is_no_object(text: str, copy: Path) -> None:
    (copy / "libortho.json").write_text(text)
    for read in (read_manifest, load_split):
        with pytest.raises(CheckpointError, match=r"libortho\.json"):
            read(copy)


def test_a_manifest_that_is_no_text(copy: Path) -> None:
    (copy / "libortho.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["libortho.json", "config.json", "base.safetensors"])
def test_missing_files(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_split(copy)


def test_not_a_folder(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_split(copy / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_manifest(copy / "config.json")


Change = Callable[[dict[str, torch.Tensor]], Any]


def _put(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def _at(name: str, index: int, value: int) -> Change:
    return lambda tensors: tensors[name].__setitem__(index, value)


def _repeat_column(tensors: dict[str, torch.Tensor]) -> None:
    crow, col = (tensors[f"{LAYER}.ortho.{part}"] for part in ("crow", "col"))
    start = int(crow[int((crow.diff() > 1).nonzero()[0])])
    col[start + 1] = col[start]


TENSOR_ERRORS: list[tuple[str, Change, str]] = [
    ("base", lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    ("base", _put("stray", torch.ones(1)), "stray is unexpected"),
    ("base", _put(f"{LAYER}.ortho.values", torch.ones(1)), "is an ortho tensor"),
    ("base", _put("lm_head.weight", torch.ones(61, 24).half()), "is F16"),
    ("base", _put("lm_head.weight", torch.ones(24, 61)), r"\[24, 61\]"),
    ("base", _put(f"{LAYER}.base.scale", torch.ones(24, 7)), r"scale is F32 \[24, 7\]"),
    ("ortho", lambda t: t.pop(f"{LAYER}.ortho.col"), "col is missing"),
    ("ortho", _put("stray", torch.ones(1)), "stray is unexpected"),
    ("ortho", _put(f"{LAYER}.ortho.crow", torch.zeros(25)), "crow is F32: expected I32"),
    ("ortho", _put(f"{LAYER}.ortho.crow", torch.zeros(9).int()), r"crow is \[9\]"),
    ("ortho", _put(f"{LAYER}.ortho.col", torch.zeros(2, 2).int()), r"col is \[2, 2\]"),
    ("ortho", _put(f"{LAYER}.ortho.values", torch.ones(3)), r"values is \[3\]"),
    ("ortho", _put(f"{LAYER}.ortho.values", torch.ones(48).int()), "values is I32"),
    ("ortho", _at(f"{LAYER}.ortho.col", 0, 40), r"holds 40: expected indices in \[0, 40\)"),
    ("ortho", _at(f"{LAYER}.ortho.col", 0, -1), "holds -1"),
    ("ortho", _at(f"{LAYER}.ortho.crow", 0, 1), "crow runs from 1"),
    ("ortho", _at(f"{LAYER}.ortho.crow", -1, 1000), "crow runs from 0 to 1000"),
    ("ortho", _at(f"{LAYER}.ortho.crow", 5, 2**31 - 1), "not monotone"),
    ("ortho", _at(f"{LAYER}.ortho.crow", 5, -(2**31)), "not monotone"),
    ("ortho", _repeat_column, "does not rise within a row"),
]


@pytest.mark.parametrize(("file", "change", "match"), TENSOR_ERRORS)
def test_wrong_tensors(
    file: str, change: Change, match: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_building(monkeypatch)
    rewrite(copy, file, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_split(copy)
    assert f"{file}.safetensors" in str(caught.value)


def test_rewriting_alone_does_no_harm(copy: Path) -> None:
    for file in ("base", "ortho"):
        rewrite(copy, file, lambda tensors: None)
    load_split(copy)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("left", torch.zeros(23, 3), r"left is \[23, 3\]: expected \[24, 3\]"),
        ("left", torch.zeros(24), r"left is \[24\]"),
        ("left", torch.zeros(24, 3).int(), "left is I32"),
        ("right", torch.zeros(2, 40).bfloat16(), r"right is \[2, 40\]: expected \[3, 40\]"),
        ("right", torch.zeros(3, 40), "right is F32: expected BF16"),
    ],
)
def test_wrong_factors(
    part: str, tensor: torch.Tensor, match: str, saved_low_rank: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved_low_rank, tmp_path / "copy"))
    rewrite(folder, "ortho", _put(f"{LAYER}.ortho.{part}", tensor))
    with pytest.raises(CheckpointError, match=match):
        load_split(folder)


def test_a_scale_whose_groups_do_not_divide_the_columns(copy: Path) -> None:
    rewrite(copy, "base", _put(f"{LAYER}.base.scale", torch.ones(24, 7)))
    edit(copy, lambda m: m["tensors"][f"{LAYER}.base.scale"].update(shape=[24, 7]))
    with pytest.raises(CheckpointError, match="7 groups, which do not divide 40 columns"):
        load_split(copy)


@pytest.fixture
def int4_copy(tmp_path: Path) -> Path:
    save_split(split_model(kind="sparse", base=BASES["int4"]), tmp_path / "int4")
    return tmp_path / "int4"


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("qdata", torch.zeros(24, 40).byte(), r"qdata is \[24, 40\]: expected \[24, 20\]"),
        ("qdata", torch.zeros(24, 20).char(), "qdata is I8: expected U8"),
        ("scale", torch.ones(24, 5), "scale is F32: expected BF16"),
        ("scale", torch.ones(24, 7).bfloat16(), "7 groups, which do not divide 40 columns"),
        ("scale", torch.ones(120).bfloat16(), r"scale is \[120\]: expected \[24, 120\]"),
        ("zero", torch.zeros(24, 4).byte(), r"zero is \[24, 4\]: expected \[24, 5\]"),
        ("zero", torch.zeros(24, 5), "zero is F32: expected U8"),
        ("zero", None, "base.zero is missing"),
    ],
)
def test_wrong_int4_tensors(
    part: str, tensor: torch.Tensor | None, match: str, int4_copy: Path, monkeypatch
) -> None:
    forbid_building(monkeypatch)
    name = f"{LAYER}.base.{part}"
    if tensor is None:
        rewrite(int4_copy, "base", lambda tensors: tensors.pop(name))
        edit(int4_copy, lambda m: m["tensors"].pop(name))
    else:
        rewrite(int4_copy, "base", _put(name, tensor))
        dtype = {torch.uint8: "U8", torch.int8: "I8", torch.bfloat16: "BF16"}.get(tensor.dtype)
        written = {"dtype": dtype or "F32", "shape": list(tensor.shape)}
        edit(int4_copy, lambda m: m["tensors"].update({name: written}))
    with pytest.raises(CheckpointError, match=match):
        load_split(int4_copy)


def test_int4_has_no_odd_width_and_int8_no_zero(int4_copy: Path) -> None:
    before = (int4_copy / "libortho.json").read_text()
    edit(int4_copy, lambda m: entry(m).update(shape=[24, 41]))
    with pytest.raises(CheckpointError, match="41 columns: int4 packs two to a byte"):
        load_split(int4_copy)
    (int4_copy / "libortho.json").write_text(before)
    edit(int4_copy, lambda m: entry(m).update(base="int8"))
    with pytest.raises(CheckpointError, match=r"base\.zero does not belong .* int8 base"):
        load_split(int4_copy)


@pytest.mark.parametrize("file", ["base", "ortho"])
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files(file: str, keep: int, copy: Path) -> None:
    path = copy / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{file}\.safetensors: truncated"):
        load_split(copy)


@pytest.mark.parametrize("file", ["base", "ortho"])
def test_one_flipped_bit_is_found(file: str, copy: Path) -> None:
    path = copy / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file}\.safetensors.*sha256"):
        load_split(copy)


def test_the_ortho_file_of_another_split_is_refused(copy: Path, tmp_path: Path) -> None:
    save_split(split_model(kind="sparse", seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other/ortho.safetensors", copy)
    with pytest.raises(CheckpointError, match=r"ortho\.safetensors: made for the base"):
        load_split(copy)
    shutil.copy(tmp_path / "other/base.safetensors", copy)
    with pytest.raises(CheckpointError, match=r"ortho\.safetensors|base\.safetensors"):
        load_split(copy)


def test_an_ortho_file_without_a_binding_is_refused(copy: Path) -> None:
    path = copy / "ortho.safetensors"
    save_file({name: t.clone() for name, t in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="made for the base"):
        load_split(copy)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 48}, r"Linear of shape \(48, 40\): expected .* \(24, 40\)"),
        ({"vocab_size": 62}, r"lm_head.weight is \[61, 24\], the config's model has \[62"),
        ({"num_hidden_layers": 3}, "is missing: the config's model has it"),
        ({"num_hidden_layers": 1}, "down_proj is missing|is unexpected"),
        ({"intermediate_size": 41}, r"of shape \(24, 41\)"),
        ({"model_type": "no_such_model"}, "config"),
        ({"hidden_size": "wide"}, "config"),
    ],
)
def test_a_config_that_is_not_of_these_tensors(
    change: dict[str, Any], match: str, copy: Path
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match) as caught:
        load_split(copy)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_json(name: str, text: str, copy: Path) -> None:
    (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        load_split(copy)


def test_a_config_cannot_bring_code(copy: Path) -> None:
    path = copy / "config.json"
    code = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (copy / "code.py").write_text("raise SystemExit('code from a checkpoint was run')")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_split(copy)


# --- all or nothing ------------------------------------------------------------------------------


def failing(function: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    """`function`, raising instead of its call number `at` (from 0)."""
    calls = iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return function(*args, **kwargs)

    return call


STEPS: list[tuple[object, str, int]] = [
    (write, "save_file", 0),
    (write, "save_file", 1),
    (write, "sha256_of", 0),
    (write, "_write_text", 0),
    (write, "check_tensors", 0),
    (transformers.PreTrainedConfig, "save_pretrained", 0),
    (shutil, "copymode", 0),
    (os, "fsync", 0),
    (os, "fsync", 5),
    (os, "fsync", 6),
    (os, "rename", 0),
    (os, "rename", 1),
]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("owner", "name", "at"), STEPS)
def test_a_failed_save_changes_nothing(
    owner: object,
    name: str,
    at: int,
    error: BaseException,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = snapshot(copy)
    model = split_model(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, error))
        with pytest.raises(type(error)):
            save_split(model, copy)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert snapshot(copy) == before
    load_split(copy)
    save_split(model, copy)
    assert_same_model(model, load_split(copy))
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [(shutil, "copyfile", 2), (write, "_check_no_memory", 0), (os, "fsync", 0), (os, "rename", 0)],
)
def test_a_failed_base_only_leaves_nothing(
    owner: object, name: str, at: int, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            base_only(copy, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    base_only(copy, tmp_path / "out")


def test_what_could_not_be_deleted_is_named(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.shutil, "rmtree", failing(shutil.rmtree, 0, OSError("busy")))
    model = split_model(seed=1)
    with pytest.warns(UserWarning, match=r"still at .*\.copy\.old-.*busy"):
        save_split(model, copy)
    assert_same_model(model, load_split(copy))


def test_saving_replaces_a_split_checkpoint_as_a_whole(copy: Path, tmp_path: Path) -> None:
    (copy / "report.json").write_text("{}")
    save_split(split_model(seed=1), copy)
    assert not (copy / "report.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_saving_into_new_empty_and_linked_folders(tmp_path: Path) -> None:
    model = split_model()
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for folder in ("new/deep", "empty", "link", "link"):
        save_split(model, tmp_path / folder)
        load_split(tmp_path / folder)
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "new", "real"]


def test_a_foreign_folder_or_file_is_never_touched(saved: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years")
    for target, match in ((foreign, "foreign is not empty"), (foreign / "thesis.txt", "is a file")):
        with pytest.raises(FileExistsError, match=match):
            save_split(split_model(), target)
        with pytest.raises(FileExistsError, match=match):
            base_only(saved, target)
        with pytest.raises(FileExistsError, match=match):
            check_writable(target)
    with pytest.raises(NotADirectoryError, match=r"thesis\.txt is a file"):
        check_writable(foreign / "thesis.txt/below")
    for target in (saved, tmp_path / "new/deep"):
        check_writable(target)
    assert snapshot(tmp_path) == {"foreign/thesis.txt": b"ten years"}


FULL_DISK = """
import resource, sys
from libortho.checkpoint import load_split, save_split
model = load_split(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save_split(model, sys.argv[1])
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
@pytest.mark.parametrize("limit", [100, 4000])
def test_a_full_disk(limit: int, copy: Path, tmp_path: Path) -> None:
    before = snapshot(copy)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(copy), str(limit)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError:")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert snapshot(copy) == before
    load_split(copy)
