"""A split checkpoint for serving: whole where it can be had, without its memory where it cannot."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from libortho.alpha import ortho_layers
from libortho.base import BaseStream
from libortho.checkpoint import load_split, read_manifest
from libortho.errors import LibOrthoError, OrthoLocked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        model: alpha starts at 0.
        tokenizer: the checkpoint's own.
        digest: SHA-256 of the base stream.
        ortho: "present" where every split layer has its ortho stream; "unusable" where the file is
            there and cannot be trusted or read; "locked" where it is encrypted and there is no key.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    ortho: Literal["present", "missing", "unusable", "locked"]


def load_for_serving(folder: Path, dtype: torch.dtype | None = None, dense: bool = False) -> Loaded:
    """Load a split checkpoint; one whose ortho file is damaged or locked is loaded without it.

    Args:
        folder: a split checkpoint.
        dtype: of what is not split, as `load_split`.
        dense: unpack the base streams once, into `dtype` or the dtype of the embeddings: faster
            where the machine has no fast kernel for the stored form, at the memory of the original
            model. The numbers are those that the stored form stands for, rounded to that dtype.

    Raises:
        CheckpointError: the base, or anything else that alpha 0 needs, is missing or damaged.
    """
    from transformers import AutoTokenizer

    ortho: Literal["present", "missing", "unusable", "locked"] = "present"
    try:
        model = load_split(folder, dtype=dtype)
    except (LibOrthoError, ValueError, OSError) as error:
        # If it is not the ortho file, or its key, that is at fault, the same error comes again.
        model = load_split(folder, dtype=dtype, base_only=True)
        ortho = "locked" if isinstance(error, OrthoLocked) else "unusable"
        log.error("the ortho stream cannot be used, only alpha 0 is served: %s", error)
    else:
        if any(layer.ortho is None for layer in ortho_layers(model).values()):
            ortho = "missing"
    if dense:
        unpack_bases(model)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return Loaded(
        model,
        tokenizer,
        read_manifest(folder).base_sha256,
        ortho,
    )


def unpack_bases(model: PreTrainedModel) -> None:
    """Replace every base stream by the dense matrix that it stands for, in place."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    for layer in ortho_layers(model).values():
        layer.base = BaseStream(layer.base.dequantize(weight.dtype), None)
