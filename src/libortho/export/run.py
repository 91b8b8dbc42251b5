"""export_split: check -> write beside -> rename."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libortho._version import __version__
from libortho.alpha import ortho_layers
from libortho.checkpoint.atomic import check_writable, replacing
from libortho.checkpoint.manifest import read_manifest
from libortho.checkpoint.names import PathLike
from libortho.checkpoint.schema import blame, read_object
from libortho.checkpoint.streams import streams_digest
from libortho.export.registry import ExportReport, target_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "libortho_export.json"


def export_split(
    model: PreTrainedModel,
    out: PathLike,
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
    layers = ortho_layers(model)
    out = Path(out)
    check_new(out)
    with replacing(out) as partial:
        report = target.write(model, partial, config, tokenizer)
        report = dataclasses.replace(report, streams_sha256=streams_digest(layers))
        text = json.dumps({"libortho": __version__, **report.to_dict()}, indent=1)
        (partial / REPORT).write_text(text + "\n", encoding="utf-8")
        check_new(out)
    return report


def check_made_from(export: PathLike, folder: PathLike) -> None:
    """Raise ValueError unless an export was made from this split checkpoint.

    Args:
        export: folder of the export.
        folder: of the checkpoint.

    Raises:
        ValueError: it was made from another split, or it does not say from which.
        CheckpointError: `folder` is no split checkpoint, or the export's report is no JSON.
    """
    report = Path(export) / REPORT
    made_from = None
    if report.is_file():
        with blame(report):
            made_from = read_object(report).get("streams_sha256")
    if not made_from:
        raise ValueError(f"{report} does not say which split {export} was made from: export again")
    expected = read_manifest(folder).streams_sha256
    if made_from != expected:
        raise ValueError(
            f"{export} was made from the split whose streams have the sha256 {made_from[:12]}..., "
            f"those of {folder} have {expected[:12]}...: the two are not of one split; export again"
        )


def check_new(out: PathLike) -> None:
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
