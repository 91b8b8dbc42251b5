"""export_split: check -> write beside -> rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libortho._version import __version__
from libortho.alpha import ortho_layers
from libortho.checkpoint.atomic import check_writable, replacing
from libortho.export.registry import ExportReport, target_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "libortho_export.json"


def export_split(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    config: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ExportReport:
    """Write a split model in another tool's form, all or nothing; the model stays as it is.

    Args:
        model: a transformers causal LM with `OrthoLinear` layers.
        out: a folder that is not there yet, or is empty.
        config: a `DenseExport`, `PeftExport`, ...: its class says which target.
        tokenizer: written beside the model.

    Returns:
        The report, which is also in `libortho_export.json`.

    Raises:
        TypeError: not a config of a target, not a transformers model, or a layer of a kind that the
            target does not know.
        ValueError: the model is not split, or cannot be put into this form (the message says why).
        OrthoStreamMissing: an adapter is asked for and the ortho stream is not there.
        LibOrthoError: a package of the `export` extra is not installed.
        FileExistsError: `out` is there and not empty.
        OSError: it cannot be written.
    """
    from transformers import PreTrainedModel as Expected

    target = target_of(config)
    if not isinstance(model, Expected):
        raise TypeError(f"model is a {type(model).__name__}: expected a transformers model")
    ortho_layers(model)
    out = Path(out)
    check_new(out)
    with replacing(out) as partial:
        report = target.write(model, partial, config, tokenizer)
        text = json.dumps({"libortho": __version__, **report.to_dict()}, indent=1)
        (partial / REPORT).write_text(text + "\n", encoding="utf-8")
        check_new(out)
    return report


def check_new(out: str | os.PathLike[str]) -> None:
    """Raise now what `export_split` would raise of `out` after its work.

    Raises:
        FileExistsError: it exists and is not an empty folder.
        NotADirectoryError, PermissionError: it could not be made where it is to be.
    """
    path = Path(out)
    # A split checkpoint would be replaced by `save_split`; here it may be the very source.
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} is there already and not empty: nothing was written; choose a new folder"
        )
    check_writable(path)
