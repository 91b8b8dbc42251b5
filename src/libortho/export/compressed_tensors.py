"""`compressed-tensors`: the INT8 base in the format that stock vLLM loads, LoRA beside it.

https://github.com/vllm-project/compressed-tensors. The codes are written as they are; nothing is
quantised again. With 16-bit activations (W8A16) that is our base; W8A8 rounds each token's
activations to INT8 on top, for engines that have no kernel for INT8 weights alone (vLLM on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from libortho.alpha import ortho_layers
from libortho.base import HalfBase, Int4Base, Int8Base
from libortho.config import FactorDtype, check_choice
from libortho.export.adapters import (
    SPARE_SLOT,
    check_alphas,
    empty_layers,
    streams,
    write_adapters,
)
from libortho.export.peft import BASE
from libortho.export.plain import (
    check_dtype,
    conv1d_names,
    plain_model,
    save_plain,
    storing_error,
    weight_dtype,
)
from libortho.export.registry import ExportReport, register, require
from libortho.layer import OrthoLinear
from libortho.ortho import SparseOrtho

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Activations = Literal["16bit", "int8"]

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM computes as one, and so quantises all alike or not at all."""


@dataclass(frozen=True)
class CompressedTensorsExport:
    """An INT8 base model in compressed-tensors' format and one LoRA adapter per alpha.

    Attributes:
        alphas: of the adapters, in (0, 1]; none is the base alone.
        activations: "16bit" (W8A16, format pack-quantized: the base as it is), or "int8" (W8A8,
            format int-quantized: activations are rounded too, per token, when it runs).
        dtype: of the weights that are not INT8; None keeps what the model has.
    """

    alphas: tuple[float, ...] = (1.0,)
    activations: Activations = "16bit"
    dtype: FactorDtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", check_alphas(self.alphas))
        check_choice("activations", self.activations, Activations)
        check_dtype(self.dtype)


def write_compressed_tensors(
    model: PreTrainedModel,
    folder: Path,
    config: CompressedTensorsExport,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ExportReport:
    """Write `base/` and the adapters' folders."""
    require("compressed_tensors", "the target compressed-tensors")
    layers = ortho_layers(model)
    group = check_int8(layers, config.activations)
    check_fused(layers)
    convolutions = conv1d_names(model)
    if convolutions:
        raise TypeError(
            f"{min(convolutions)} is a Conv1D, and compressed-tensors quantises nn.Linear only: "
            "use the target peft"
        )
    if config.alphas and isinstance(next(iter(streams(model).values())), SparseOrtho):
        raise ValueError(
            "the ortho stream is sparse, and vLLM has no sparse adapter: use the target peft "
            "(SHiRA), or export the base alone (alphas=(), --base-only)"
        )
    adapters, rank = write_adapters(model, folder, config.alphas, convolutions)
    scale_dtype = weight_dtype(model, config.dtype)
    stored, _ = plain_model(model, lambda name, layer: layer.base.qdata, config.dtype)
    errors = [
        _replace(stored, name, layer, config.activations, scale_dtype)
        for name, layer in layers.items()
    ]
    ignore = [
        name
        for name, module in stored.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
    ]
    stored.config.quantization_config = quantization_config(config.activations, group, ignore)
    save_plain(stored, folder / BASE, tokenizer, private=False)
    return ExportReport(
        target="compressed-tensors",
        layers=len(layers),
        weight_error=max(errors),
        adapters=adapters,
        empty=empty_layers(model),
        max_rank=rank,
        notes=(*_notes(config.activations, group), *((SPARE_SLOT,) if adapters else ())),
    )


def _notes(activations: Activations, group: int | None) -> tuple[str, ...]:
    if activations == "int8":
        return (
            "W8A8: the engine rounds activations to INT8 too, which LibOrtho does not; measure "
            "that the base still has forgotten",
            "on a CPU without matrix tiles (Intel AMX) vLLM 0.32 runs such a base, but cannot put "
            "an adapter on it: export to peft there",
        )
    needs = "" if group is None else f" (groups of {group} columns: Marlin takes 32, 64 and 128)"
    return (f"W8A16: vLLM runs it on a GPU{needs}; on a CPU it has no such kernel, use int8",)


def check_int8(layers: dict[str, OrthoLinear], activations: Activations) -> int | None:
    """The columns that share a scale, in every layer; None is one scale a row.

    Raises:
        TypeError: a base stream is not INT8.
        ValueError: the layers differ in it, or W8A8 is wanted of groups.
    """
    groups: dict[int | None, str] = {}
    for name, layer in layers.items():
        base = layer.base
        if isinstance(base, Int4Base):
            raise TypeError(
                f"{name} has an INT4 base, whose zero points are in 16ths of a code: "
                "compressed-tensors has whole ones only, and rounding them would move the base "
                "that was measured; split with --base int8, or use the target peft"
            )
        if isinstance(base, HalfBase):
            raise TypeError(
                f"{name} has an FP16 base, which is not quantised: use the target peft, or split "
                "with --base int8"
            )
        if not isinstance(base, Int8Base):
            raise TypeError(f"{name}.base is a {type(base).__name__}: expected an Int8Base")
        count = base.scale.shape[1]
        groups.setdefault(None if count == 1 else layer.in_features // count, name)
    if len(groups) > 1:
        found = ", ".join(f"{name}: {size or 'a row'}" for size, name in groups.items())
        raise ValueError(
            f"columns that share a scale differ between layers ({found}): expected one group size"
        )
    (group,) = groups
    if activations == "int8" and group is not None:
        raise ValueError(
            f"activations='int8' with groups of {group} columns: vLLM runs W8A8 with one scale a "
            "row only; expected activations='16bit'"
        )
    return group


def check_fused(layers: dict[str, OrthoLinear]) -> None:
    """Raise ValueError where only some of the layers that vLLM fuses are split."""
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        for names in FUSED:
            missing = [n for n in names if f"{parent}.{n}" not in layers]
            if leaf in names and missing:
                raise ValueError(
                    f"{name} is split and {', '.join(missing)} beside it not: vLLM computes "
                    f"{', '.join(names)} as one, which must be quantised all alike; split all of "
                    "them, or use the target peft"
                )


def quantization_config(
    activations: Activations, group: int | None, ignore: list[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        activations: as in `CompressedTensorsExport`.
        group: columns that share a scale, None for a whole row.
        ignore: every linear layer that is not quantised.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
    from compressed_tensors.quantization import QuantizationScheme as Scheme

    weights = QuantizationArgs(
        num_bits=8,
        type="int",
        symmetric=True,
        strategy="channel" if group is None else "group",
        group_size=group,
        dynamic=False,
    )
    inputs = None
    if activations == "int8":
        inputs = QuantizationArgs(
            num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True
        )
    form = "pack-quantized" if activations == "16bit" else "int-quantized"
    made = QuantizationConfig(
        config_groups={
            "group_0": Scheme(targets=["Linear"], weights=weights, input_activations=inputs)
        },
        format=form,
        quantization_status="compressed",
        ignore=ignore,
    )
    plain: dict[str, Any] = made.model_dump(mode="json", exclude_none=True)
    return plain


def _replace(
    stored: nn.Module,
    name: str,
    layer: OrthoLinear,
    activations: Activations,
    scale_dtype: torch.dtype,
) -> float:
    """Put a layer's INT8 tensors where its weight stood; returns what storing them cost."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    module = stored.get_submodule(name)
    codes, scale = layer.base.qdata, layer.base.scale
    assert scale is not None
    # Readers hold scales in the dtype of the activations; rounded here, it can be measured.
    scale = scale.to(scale_dtype)
    del module.weight
    parts: dict[str, Tensor] = {"weight_scale": scale}
    if activations == "16bit":
        parts["weight_packed"] = pack_to_int32(codes, 8)
        parts["weight_shape"] = torch.tensor(layer.base.shape)
    else:
        parts["weight"] = codes
    for part, tensor in parts.items():
        module.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
    return storing_error(
        layer.base.dequantize(torch.float32), Int8Base(codes, scale.float()).dequantize()
    )


register("compressed-tensors", CompressedTensorsExport, write_compressed_tensors)
