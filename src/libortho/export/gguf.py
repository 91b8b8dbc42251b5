"""`gguf`: base and LoRA for llama.cpp, which takes the adapter's scale, our alpha, per request.

Written with the `gguf` package: its writer, its tensor names, its Q8_0. What those leave to the
converter is here: the architectures' settings, the order of Llama's query and key rows, and which
of llama.cpp's text splitters is the tokenizer's. Whatever is not known for sure is refused: a file
that loads and answers a little wrong is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from libortho.alpha import ortho_layers
from libortho.config import check_choice
from libortho.export.adapters import check_alphas, empty_layers, streams
from libortho.export.gguf_tokenizer import add_tokenizer
from libortho.export.plain import plain_model, storing_error
from libortho.export.registry import ExportReport, register, require
from libortho.ortho import LowRankOrtho

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GgufStorage = Literal["f32", "f16", "bf16", "q8_0"]

BASE_FILE = "base.gguf"
ADAPTER_FILE = "ortho.gguf"

PRIVATE_START = (
    "llama.cpp: the adapter's scale is alpha; start the server with scale 0, and without reuse of "
    "prompts (--no-cache-prompt): a request that names no scale can otherwise run on what one at "
    "alpha 1 left in the cache"
)
"""What everyone who serves these files has to know: else alpha 0 leaks."""

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""transformers' model type -> llama.cpp's architecture."""

FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}


@dataclass(frozen=True)
class GgufExport:
    """A base model and a LoRA adapter as GGUF files.

    Attributes:
        alphas: (1.0,), or none for the base alone. llama.cpp scales the adapter per request, so
            there is nothing to write for other alphas.
        storage: of the base's matrices. "f16" keeps an INT8 base almost exactly; "q8_0" rounds it
            again, in blocks of 32 columns (the report says what that costs).
    """

    alphas: tuple[float, ...] = (1.0,)
    storage: GgufStorage = "f16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", check_alphas(self.alphas))
        if self.alphas not in ((), (1.0,)):
            raise ValueError(
                f"alphas={self.alphas!r}: llama.cpp scales an adapter per request; expected (1.0,) "
                "or, for the base alone, ()"
            )
        check_choice("storage", self.storage, GgufStorage)


def write_gguf(
    model: PreTrainedModel,
    folder: Path,
    config: GgufExport,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ExportReport:
    """Write `base.gguf` and `ortho.gguf`."""
    gguf = require("gguf", "the target gguf")
    check_architecture(model.config)
    if tokenizer is None:
        raise ValueError(
            "no tokenizer: a GGUF file holds it, and llama.cpp reads no text without it"
        )
    adapters, rank = {}, None
    if config.alphas:
        factors = _low_rank(model)
        _write_adapter(gguf, folder / ADAPTER_FILE, model.config, factors)
        adapters = {ADAPTER_FILE: 1.0}
        rank = max(stream.rank for stream in factors.values())
    error = _write_base(gguf, folder / BASE_FILE, model, config.storage, tokenizer)
    return ExportReport(
        target="gguf",
        layers=len(ortho_layers(model)),
        weight_error=error,
        adapters=adapters,
        empty=empty_layers(model),
        max_rank=rank,
        notes=(PRIVATE_START,) if adapters else (),
    )


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise TypeError or ValueError unless a model of this config can be written faithfully."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise TypeError(
            f"model_type={kind!r}: expected one of {', '.join(sorted(ARCHITECTURES))}; export "
            "another as peft and convert it with llama.cpp's own scripts"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    wanted = {
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "hidden_act": (config.hidden_act, "silu"),
        "use_sliding_window": (getattr(config, "use_sliding_window", False), False),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise ValueError(
                f"{name}={found!r}: this export knows {expected!r} only; export as peft and "
                "convert that with llama.cpp's own scripts"
            )


def _low_rank(model: PreTrainedModel) -> dict[str, LowRankOrtho]:
    found: dict[str, Any] = streams(model)
    for name, stream in found.items():
        if not isinstance(stream, LowRankOrtho):
            raise ValueError(
                f"the ortho stream of {name} is sparse, and llama.cpp has no sparse adapter: "
                "export as dense or peft, or the base alone (alphas=(), --base-only)"
            )
    return found


def _head_dim(config: PreTrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def rows_as_in_gguf(tensor: Tensor, name: str, config: PreTrainedConfig) -> Tensor:
    """`tensor` (out_features, ...) with its rows in llama.cpp's order.

    llama.cpp rotates neighbouring pairs of a Llama head's dimensions, where transformers rotates
    the first half with the second; so the query and key rows of each head are interleaved.

    Args:
        tensor: a weight, a bias, or the left factor of a LoRA.
        name: of the layer.
        config: the model's.
    """
    leaf = name.rpartition(".")[2]
    if config.model_type != "llama" or leaf not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _names(gguf: Any, config: PreTrainedConfig) -> Any:
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def _gguf_name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise TypeError(f"{name}: the gguf package knows no name for it in this architecture")
    return str(found)


def _writer(gguf: Any, path: Path, config: PreTrainedConfig) -> Any:
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    return gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_adapter(
    gguf: Any, path: Path, config: PreTrainedConfig, factors: dict[str, LowRankOrtho]
) -> None:
    writer = _writer(gguf, path, config)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / rank, with one alpha for layers of all ranks; 0 tells it to take
    # the scale of the request as it is.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    names = _names(gguf, config)
    for name, stream in factors.items():
        place = _gguf_name(names, f"{name}.weight")
        left = rows_as_in_gguf(stream.left, name, config)
        for part, tensor in (("lora_a", stream.right), ("lora_b", left)):
            # fp16 as it is stored; anything else in fp32, which holds it.
            dtype = torch.float16 if tensor.dtype == torch.float16 else torch.float32
            data = tensor.detach().cpu().to(dtype).contiguous().numpy()
            writer.add_tensor(f"{place}.{part}", data)
    _finish(writer)
    path.chmod(0o600)


def _write_base(
    gguf: Any,
    path: Path,
    model: PreTrainedModel,
    storage: GgufStorage,
    tokenizer: PreTrainedTokenizerBase,
) -> float:
    plain, _ = plain_model(model, lambda name, layer: layer.base.dequantize())
    config: Any = plain.config
    writer = _writer(gguf, path, config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[storage]))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(gguf, writer, tokenizer, config.vocab_size)
    names = _names(gguf, config)
    layers = ortho_layers(model)
    worst = 0.0
    for name, tensor in plain.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.rpartition(".")[0]
        if module in layers and name.endswith(".weight"):
            tensor = layers[module].base.dequantize()  # not rounded to the model's dtype before
        exact = rows_as_in_gguf(tensor.detach().cpu().float(), module, config)
        worst = max(worst, _add(gguf, writer, _gguf_name(names, name), exact, storage))
    _finish(writer)
    return worst


def _add(gguf: Any, writer: Any, name: str, exact: Tensor, storage: GgufStorage) -> float:
    """Add one tensor; returns what storing it cost."""
    kind = getattr(gguf.GGMLQuantizationType, "F32" if exact.dim() == 1 else storage.upper())
    columns = exact.shape[-1]
    if kind == gguf.GGMLQuantizationType.Q8_0 and columns % 32:
        raise ValueError(
            f"{name} has {columns} columns, and Q8_0 stores blocks of 32: use storage='f16'"
        )
    with np.errstate(over="ignore"):  # found below, with the tensor's name
        data = gguf.quants.quantize(exact.contiguous().numpy(), kind)
    stored = torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).reshape(exact.shape)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"{name} reaches {float(exact.abs().max()):.6g}, beyond {storage}: use storage='bf16'"
        )
    writer.add_tensor(name, data, raw_dtype=kind)
    return storing_error(exact, stored)


register("gguf", GgufExport, write_gguf)
