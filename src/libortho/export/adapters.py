"""The ortho streams of a model as PEFT adapters: low-rank ones as LoRA, sparse ones as SHiRA.

An adapter is one folder per alpha, named `ortho` (alpha 1), `ortho-0.5` and so on, whose weight
file is closed to others (mode 0600) as the ortho file of a checkpoint is: it holds the memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from libortho.alpha import ortho_layers
from libortho.config import check_fraction
from libortho.errors import OrthoStreamMissing
from libortho.export.registry import require
from libortho.ortho import LowRankOrtho, SparseOrtho

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"

SPARE_SLOT = (
    "vLLM: set max_loras above the number of adapters it will ever load; on a CPU (seen in 0.32) "
    "a request without an adapter is computed with the last slot's, which must stay empty"
)
"""What everyone who serves a LoRA export has to know: else alpha 0 leaks."""


def check_alphas(alphas: Sequence[float]) -> tuple[float, ...]:
    """The alphas of an export's adapters, checked; none at all is the base alone.

    Raises:
        ValueError: one is outside (0, 1], or given twice. (Alpha 0 is the base without an adapter.)
    """
    for alpha in alphas:
        check_fraction("alphas", alpha)
    if len(set(alphas)) != len(alphas):
        raise ValueError(f"alphas={tuple(alphas)!r}: expected each value once")
    return tuple(float(alpha) for alpha in alphas)


def adapter_name(alpha: float) -> str:
    """The folder, and the name by which it is served, of the adapter with this alpha."""
    return "ortho" if alpha == 1 else f"ortho-{alpha!r}"


def streams(model: PreTrainedModel) -> dict[str, LowRankOrtho] | dict[str, SparseOrtho]:
    """The ortho streams that hold something, by layer; all of one kind.

    Raises:
        OrthoStreamMissing: a layer has none (a base-only deployment).
        ValueError: sparse and low-rank streams are mixed, or all of them are empty.
    """
    found: dict[str, Any] = {}
    for name, layer in ortho_layers(model).items():
        if layer.ortho is None:
            raise OrthoStreamMissing(
                f"{name} has no ortho stream, so there is nothing to make an adapter of: load the "
                "ortho file too, or export the base alone (alphas=(), --base-only)"
            )
        if layer.ortho.numel:
            found[name] = layer.ortho
    kinds = {stream.kind for stream in found.values()}
    if not kinds:
        raise ValueError(
            "every ortho stream is empty: there is nothing to make an adapter of; export the base "
            "alone (alphas=(), --base-only)"
        )
    if len(kinds) > 1:
        raise ValueError(
            "some ortho streams are sparse and some low-rank, and one PEFT adapter cannot be both: "
            "expected a split by one method"
        )
    return found


def empty_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Split layers whose ortho stream is there and holds nothing."""
    layers = ortho_layers(model).items()
    return tuple(n for n, x in layers if x.ortho is not None and x.ortho.numel == 0)


def write_lora(
    folder: Path,
    factors: Mapping[str, LowRankOrtho],
    alphas: Sequence[float],
    convolutions: frozenset[str],
) -> dict[str, float]:
    """Write one LoRA adapter per alpha; PEFT's scale, lora_alpha / r, is alpha in every layer.

    The factors are written as they are stored, so nothing is rounded.

    Args:
        folder: gets the adapters' folders.
        factors: the ortho streams by layer, ranks above 0.
        alphas: in (0, 1].
        convolutions: the layers that are Conv1D.

    Returns:
        Name of each adapter -> its alpha.
    """
    peft = require("peft", "a LoRA adapter")
    rank = max(stream.rank for stream in factors.values())
    # PEFT reads the keys of a pattern as regular expressions.
    ranks = {re.escape(n): stream.rank for n, stream in factors.items() if stream.rank != rank}
    tensors = {}
    for name, stream in factors.items():
        tensors[f"{name}.lora_A.weight"] = stream.right
        tensors[f"{name}.lora_B.weight"] = stream.left
    written = {}
    for alpha in alphas:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            r=rank,
            # PEFT takes any number here, though its annotation says int.
            lora_alpha=_number(alpha * rank),
            rank_pattern=ranks,
            alpha_pattern={key: _number(alpha * r) for key, r in ranks.items()},
            target_modules=list(factors),
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=bool(convolutions & set(factors)),
        )
        _write(folder / adapter_name(alpha), config, tensors)
        written[adapter_name(alpha)] = alpha
    return written


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def write_shira(
    folder: Path,
    streams: Mapping[str, SparseOrtho],
    alphas: Sequence[float],
    convolutions: frozenset[str],
) -> dict[str, float]:
    """Write one SHiRA adapter per alpha (Bhardwaj et al. 2024, arXiv 2406.13175).

    SHiRA gives every layer r (out + in) entries with one r for all, so each layer's entries are
    filled up with zeros at free places. It has no scale in its files: alpha is multiplied in.

    Args and returns: as `write_lora`, of sparse streams with at least one entry.

    Raises:
        TypeError: a layer is a Conv1D, which SHiRA does not take.
        ValueError: a layer is too small to be filled up to the r that another one needs.
    """
    peft = require("peft", "a SHiRA adapter")
    if convolutions & set(streams):
        raise TypeError(
            f"{min(convolutions & set(streams))} is a Conv1D, which PEFT's SHiRA does not take; "
            "export it as dense"
        )
    rank = max(math.ceil(stream.numel / sum(stream.shape)) for stream in streams.values())
    for name, stream in streams.items():
        if rank * sum(stream.shape) > math.prod(stream.shape):
            raise ValueError(
                f"{name} has {math.prod(stream.shape)} weights, and SHiRA would need "
                f"{rank * sum(stream.shape)} entries in it to hold the {stream.numel} of the "
                "largest ortho stream: this split is too dense for SHiRA; export it as dense"
            )
    written = {}
    for alpha in alphas:
        tensors = {}
        for name, stream in streams.items():
            indices, values = _filled_up(stream, rank * sum(stream.shape))
            tensors[f"{name}.shira_indices"] = indices
            tensors[f"{name}.shira_weight"] = values * alpha
        config = peft.ShiraConfig(
            task_type="CAUSAL_LM", inference_mode=True, r=rank, target_modules=list(streams)
        )
        _write(folder / adapter_name(alpha), config, tensors)
        written[adapter_name(alpha)] = alpha
    return written


def _filled_up(stream: SparseOrtho, count: int) -> tuple[Tensor, Tensor]:
    """`count` places (2, count) int32 and values (count,) fp32: the stream's, then zeros."""
    from libortho.kernels.reference import csr_rows

    columns = stream.shape[1]
    taken = csr_rows(stream.crow.cpu()) * columns + stream.col.cpu().long()
    free = torch.ones(math.prod(stream.shape), dtype=torch.bool)
    free[taken] = False
    places = torch.cat((taken, free.nonzero()[: count - len(taken), 0]))
    values = torch.zeros(count)
    values[: len(taken)] = stream.values.cpu().float()
    return torch.stack((places // columns, places % columns)).to(torch.int32), values


def _write(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    config.save_pretrained(str(folder))
    named = {
        f"base_model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(named, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o600)


def write_adapters(
    model: PreTrainedModel,
    folder: Path,
    alphas: Sequence[float],
    convolutions: frozenset[str],
) -> tuple[dict[str, float], int | None]:
    """The adapters of `alphas` as the kind of the streams asks; (name -> alpha, LoRA rank).

    Raises:
        OrthoStreamMissing, ValueError, TypeError: as `streams`, `write_lora` and `write_shira`.
    """
    if not alphas:
        return {}, None
    found = streams(model)
    first = next(iter(found.values()))
    if isinstance(first, SparseOrtho):
        return write_shira(folder, found, alphas, convolutions), None  # type: ignore[arg-type]
    low_rank: dict[str, LowRankOrtho] = found  # type: ignore[assignment]
    written = write_lora(folder, low_rank, alphas, convolutions)
    return written, max(stream.rank for stream in low_rank.values())
