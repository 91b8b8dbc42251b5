"""What the checkpoint tests share: small models of several families, split; and broken folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from libortho import BaseConfig, OrthoLinear, SpectralConfig, alpha_scope
from libortho.base import quantize
from libortho.checkpoint import save_split
from libortho.integrations import transformers as integration
from libortho.linear import install, read_linear, select_linear
from libortho.methods.spectral import split_spectral
from libortho.ortho import LowRankOrtho
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


def _new_model(family: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][0]())
    for parameter in model.parameters():
        # Biases and norms start at 0 and 1: shaken, so that a lost one shows.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def _split_layer(module: nn.Module, kind: str, base: BaseConfig, name: str = "") -> OrthoLinear:
    weight, bias = read_linear(module, name)
    if kind == "sparse":
        split = split_spectral(weight, SpectralConfig(ortho_ratio=0.05, base=base))
    else:
        left, right = torch.randn(weight.shape[0], 3), torch.randn(3, weight.shape[1])
        ortho = LowRankOrtho.from_factors(left, right, torch.bfloat16)
        split = Split(quantize(weight - ortho.dense(), base), ortho)
    split = dataclasses.replace(split, note="made for a test")
    report = measure_layer(name, "test", weight, split)
    return OrthoLinear.from_streams(split.base, split.ortho, bias, report)


def _split_model(
    family: str = "llama",
    kind: str = "low_rank",
    base: BaseConfig | None = None,
    seed: int = 0,
) -> Any:
    model = _new_model(family, seed)
    targets = select_linear(model, FAMILIES[family][1])
    config = base or BaseConfig()
    install(model, {n: _split_layer(m, kind, config, n) for n, m in targets.items()})
    return model


@torch.no_grad()
def _logits(model: Any, alpha: float) -> torch.Tensor:
    with alpha_scope(model, alpha):
        return model(IDS).logits


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def _assert_same_model(a: Any, b: Any, *, ortho: bool = True) -> None:
    """Every tensor, stored or computed, and the logits at both ends of alpha."""
    first, second = ({**m.state_dict(), **dict(m.named_buffers())} for m in (a, b))
    if not ortho:
        first = {name: t for name, t in first.items() if ".ortho." not in name}
    assert first.keys() == second.keys()
    differing = [name for name in first if not _same_bits(first[name], second[name])]
    assert differing == []
    for alpha in (0.0, 1.0) if ortho else (0.0,):
        assert _same_bits(_logits(a, alpha), _logits(b, alpha))


def _files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any], which: str = "base") -> None:
    """Change the manifest of the base, within config.json, or that of the ortho stream."""
    path = folder / ("config.json" if which == "base" else "ortho_config.json")
    plain = json.loads(path.read_text())
    change(plain["quantization_config"] if which == "base" else plain)
    path.write_text(json.dumps(plain))


def _digest(path: Path, among: str = "") -> str:
    """What docs/checkpoint-format.md says of the digest, in the fewest words."""
    lines = []
    with safe_open(path, "pt") as file:
        for name in sorted(name for name in load_file(path) if among in name):
            part = file.get_slice(name)
            raw = file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            shape = "x".join(str(size) for size in part.get_shape())
            own = hashlib.sha256(raw).hexdigest()
            lines.append(f"{name}\t{part.get_dtype()}\t{shape}\t{own}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _rewrite(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors, and make every digest right again, so that the digests find nothing."""
    path = folder / ("model.safetensors" if file == "base" else "ortho.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    found = _digest(path)
    _edit(folder, lambda plain: plain.update({f"{file}_sha256": found}), file)
    if file == "base":
        streams = _digest(path, among=".base.")
        _edit(folder, lambda plain: plain.update(streams_sha256=streams))
    if file == "base" and (folder / "ortho_config.json").exists():
        _edit(folder, lambda plain: plain.update(base_sha256=found), "ortho")


# -- the same as fixtures ------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of every family in turn."""
    return str(request.param)


@pytest.fixture
def families() -> dict[str, tuple[Callable[[], Any], tuple[str, ...]]]:
    """Family -> (builds its config, target modules)."""
    return FAMILIES


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> BaseConfig:
    """Every way to store a base, in turn."""
    return BASES[request.param]


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of token ids, which `logits_of` runs."""
    return IDS


@pytest.fixture
def new_model() -> Callable[..., Any]:
    """`new_model(family, seed)`: whole, in eval mode."""
    return _new_model


@pytest.fixture
def split_layer() -> Callable[..., OrthoLinear]:
    """`split_layer(module, kind, base, name)`: one layer in two streams, with a report."""
    return _split_layer


@pytest.fixture
def split_model() -> Callable[..., Any]:
    """`split_model(family, kind, base, seed)`: `new_model` with its family's targets split."""
    return _split_model


@pytest.fixture
def logits_of() -> Callable[..., torch.Tensor]:
    """`logits_of(model, alpha)`."""
    return _logits


@pytest.fixture
def same_bits() -> Callable[..., bool]:
    """`same_bits(a, b)`: one dtype, one shape, and the same bytes."""
    return _same_bits


@pytest.fixture
def assert_same_model() -> Callable[..., None]:
    """`assert_same_model(a, b, ortho=True)`."""
    return _assert_same_model


@pytest.fixture
def files_in() -> Callable[[Path], dict[str, bytes]]:
    """`files_in(folder)`: relative path -> content."""
    return _files_in


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(folder, change, which="base")`: change the JSON of the base's or ortho's manifest."""
    return _edit


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """`rewrite(folder, file, change)`: change tensors, and make every digest right again."""
    return _rewrite


@pytest.fixture(scope="session")
def digest_of() -> Callable[..., str]:
    """`digest_of(path, among)`: of one file's tensors, as the format's page defines it."""
    return _digest


@pytest.fixture
def forbid_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is given a checkpoint's layers before that was found wanting."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a checkpoint was used before it was found wanting")

    monkeypatch.setattr(integration, "prepare", refuse)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved sparse split; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    save_split(_split_model(kind="sparse"), folder)
    return folder


@pytest.fixture(scope="session")
def saved_low_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved low-rank split; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    save_split(_split_model(kind="low_rank"), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved`, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
