"""`peft`: the base as an ordinary Hugging Face model, the ortho streams as a PEFT adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from libortho.alpha import ortho_layers
from libortho.config import FactorDtype
from libortho.export.adapters import SPARE_SLOT, check_alphas, empty_layers, write_adapters
from libortho.export.plain import check_dtype, conv1d_names, plain_model, save_plain
from libortho.export.registry import ExportReport, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"
"""Folder of the base model in an export that has adapters beside it."""

SHIRA = (
    "the ortho stream is sparse, so the adapter is SHiRA: PEFT loads it and switches it on and off "
    "for a whole batch, but adapter_names per row and vLLM are for LoRA only"
)


@dataclass(frozen=True)
class PeftExport:
    """A plain base model and one adapter per alpha.

    Attributes:
        alphas: of the adapters, in (0, 1]; none is the base alone.
        dtype: of the base's weights; None is the dtype of the model's other weights.
    """

    alphas: tuple[float, ...] = (1.0,)
    dtype: FactorDtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", check_alphas(self.alphas))
        check_dtype(self.dtype)


def write_peft(
    model: PreTrainedModel,
    folder: Path,
    config: PeftExport,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ExportReport:
    """Write `base/` and the adapters' folders."""
    # The adapters first: what makes them impossible is found before gigabytes are written.
    adapters, rank = write_adapters(model, folder, config.alphas, conv1d_names(model))
    plain, error = plain_model(model, lambda name, layer: layer.base.dequantize(), config.dtype)
    save_plain(plain, folder / BASE, tokenizer, private=False)
    return ExportReport(
        target="peft",
        layers=len(ortho_layers(model)),
        weight_error=error,
        adapters=adapters,
        empty=empty_layers(model),
        max_rank=rank,
        notes=() if not adapters else (SHIRA,) if rank is None else (SPARE_SLOT,),
    )


register("peft", PeftExport, write_peft)
