"""`dense`: an ordinary Hugging Face model at one alpha. At 0, one without the ortho stream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from libortho.alpha import check_alpha, ortho_layers
from libortho.config import FactorDtype, check_fraction
from libortho.export.plain import check_dtype, plain_model, save_plain
from libortho.export.registry import ExportReport, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DenseExport:
    """A plain model with base + alpha * ortho in each split layer.

    Attributes:
        alpha: in [0, 1]. 0 by default: what was memorised is not in the files then.
        dtype: of the weights; None is the dtype of the model's other weights.
    """

    alpha: float = 0.0
    dtype: FactorDtype | None = None

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha, zero=True)
        check_dtype(self.dtype)


def write_dense(
    model: PreTrainedModel,
    folder: Path,
    config: DenseExport,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ExportReport:
    """Write the model files straight into `folder`."""
    for name, layer in ortho_layers(model).items():
        layer.require_ortho(check_alpha(config.alpha), name)
    plain, error = plain_model(
        model, lambda _, layer: layer.effective_weight(config.alpha), config.dtype
    )
    save_plain(plain, folder, tokenizer, private=config.alpha > 0)
    held = "" if config.alpha == 0 else f": the memory is in these files, at alpha {config.alpha:g}"
    return ExportReport(
        target="dense",
        layers=len(ortho_layers(model)),
        weight_error=error,
        notes=(f"one plain model, which has no switch{held}",),
    )


register("dense", DenseExport, write_dense)
