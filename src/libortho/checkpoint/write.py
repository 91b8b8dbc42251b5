"""save_split and base_only: check -> write beside -> check what was written -> rename."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import libortho
from libortho.alpha import ortho_layers
from libortho.checkpoint.atomic import replacing
from libortho.checkpoint.manifest import (
    BASE,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    GENERATION_CONFIG,
    MANIFEST,
    ORTHO,
    REPORT,
    FloatName,
    LayerEntry,
    Manifest,
    PathLike,
)
from libortho.checkpoint.skeleton import build_skeleton, check_fit, computed_buffers
from libortho.checkpoint.streams import ortho_names, storage_of
from libortho.checkpoint.verify import (
    DIGEST_KEY,
    check_digest,
    check_tensors,
    read_entries,
    refuse_ortho_tensors,
    sha256_of,
    verify_split,
)
from libortho.errors import CheckpointError
from libortho.layer import OrthoLinear
from libortho.report import SeparationReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_split(
    model: PreTrainedModel,
    folder: PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: SeparationReport | None = None,
) -> None:
    """Save a split model as a folder of plain files (see the package's docstring), all or nothing.

    Args:
        model: a transformers causal LM with `OrthoLinear` layers. Its alpha is not saved: a loaded
            model starts at 0.
        folder: new, empty, or a split checkpoint, which is then replaced with everything in it
            (and stays as it was if anything fails).
        tokenizer: saved beside the model.
        report: saved as `report.json`; numbers that JSON lacks (NaN, Inf) become null.

    Raises:
        TypeError: not a transformers model, or not one that its config alone rebuilds.
        ValueError: no split layer, tensors without data (meta device), or tensors that the
            config's model does not have.
        FileExistsError: `folder` holds something other than a split checkpoint.
        OSError: it cannot be written; the disk is full, for instance.
    """
    layers = _layer_entries(model)
    base, tied = _base_tensors(model)
    _check_reloads(model, layers, base, tied)
    folder = Path(folder)
    with replacing(folder) as partial:
        _write_side_files(partial, model, tokenizer, report)
        files = [p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file()]
        _write_tensors(partial / BASE, base, {"format": "pt"})
        base_sha256 = sha256_of(partial / BASE)
        manifest = Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            libortho_version=libortho.__version__,
            base_sha256=base_sha256,
            ortho_sha256=_write_ortho(partial / ORTHO, model, layers, base_sha256),
            layers=layers,
            tensors=read_entries(partial / BASE)[0],
            tied=tied,
            buffer_dtypes=_buffer_dtypes(model),
            files=tuple(sorted(files)),
        )
        _write_text(partial / MANIFEST, manifest.to_json())
        # safetensors creates its files closed to others; only the ortho file is to stay so.
        shutil.copymode(partial / MANIFEST, partial / BASE)
        try:
            check_tensors(partial, manifest)
        except CheckpointError as error:
            raise ValueError(str(error).replace(str(partial), str(folder))) from None


def base_only(folder: PathLike, out: PathLike) -> None:
    """Copy a split checkpoint without its ortho file: a deployment that holds no memory.

    Only the files that the manifest lists are copied, so that nothing that was put beside them (a
    spare ortho file, say) comes along. All or nothing, as `save_split`.

    Args:
        folder: a split checkpoint, with or without its ortho file; verified first.
        out: as `folder` of `save_split`, and neither inside of the other.

    Raises:
        ValueError: `out` is `folder`, or holds it.
        CheckpointError: the checkpoint is damaged, or an ortho tensor would be in the copy.
        FileExistsError, OSError: as `save_split`.
    """
    folder, out = Path(folder), Path(out)
    source, target = Path(os.path.realpath(folder)), Path(os.path.realpath(out))
    if source == target or target in source.parents:
        raise ValueError(f"out={str(out)!r} would replace {folder}, which holds the ortho file")
    manifest = verify_split(folder)
    with replacing(out) as partial:
        for name in (MANIFEST, BASE, *manifest.files):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing, though {MANIFEST} lists it")
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        _check_no_memory(partial, manifest)


def _check_no_memory(partial: Path, manifest: Manifest) -> None:
    # The digest says that the base file is the one that was verified; the rest looks at the copy
    # itself, so that this holds even of a manifest that lists what it should not.
    check_digest(partial / BASE, manifest.base_sha256)
    for path in partial.rglob("*"):
        if path.name == ORTHO:
            raise CheckpointError(f"{path.relative_to(partial)} is an ortho file")
        if path.suffix == ".safetensors":
            refuse_ortho_tensors(path)


def _layer_entries(model: PreTrainedModel) -> dict[str, LayerEntry]:
    from transformers import PreTrainedModel as Expected

    if not isinstance(model, Expected):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a transformers PreTrainedModel "
            "(unwrap it first)"
        )
    return {
        name: LayerEntry(
            shape=layer.base.shape,
            base=storage_of(layer.base, name),
            ortho=None if layer.ortho is None else layer.ortho.kind,
            report=layer.report and dataclasses.replace(layer.report, name=name),
        )
        for name, layer in ortho_layers(model).items()
    }


def _base_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor but the ortho streams, once each, and name -> name of those that are shared."""
    modules = model.named_modules(remove_duplicate=False)
    ortho = tuple(f"{name}.ortho." for name, m in modules if isinstance(m, OrthoLinear))
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[object, str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(ortho):
            continue
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            what = "has no data (meta device)" if isinstance(tensor, Tensor) else "is no tensor"
            raise ValueError(f"{name} {what}: only a whole model can be saved")
        place = _place_of(tensor)
        if place in seen:
            tied[name] = seen[place]
            continue
        seen[place] = name
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        # Two views of one storage are two tensors here; safetensors refuses them unless copied.
        tensors[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return tensors, tied


def _place_of(tensor: Tensor) -> object:
    if tensor.numel() == 0:
        return id(tensor)
    layout = (tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (tensor.device, tensor.data_ptr(), layout)


def _check_reloads(
    model: PreTrainedModel,
    layers: Mapping[str, LayerEntry],
    base: Mapping[str, Tensor],
    tied: Mapping[str, str],
) -> None:
    """Raise before an hour's work is written in a form that could not be read again."""
    skeleton = build_skeleton(model.config)
    if type(skeleton) is not type(model):
        raise TypeError(
            f"model is a {type(model).__name__}, but its config builds a "
            f"{type(skeleton).__name__}: expected transformers' own causal LM class"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    check_fit(skeleton, layers, shapes | {name: shapes[source] for name, source in tied.items()})


def _buffer_dtypes(model: PreTrainedModel) -> dict[str, FloatName]:
    return {
        name: str(buffer.dtype).removeprefix("torch.")  # type: ignore[misc]
        for name, buffer in computed_buffers(model).items()
        if buffer.is_floating_point()
    }


def _write_side_files(
    partial: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: SeparationReport | None,
) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial))
    model.config.save_pretrained(str(partial))
    assert (partial / CONFIG).is_file()
    if model.generation_config is not None:
        # Not save_pretrained, which refuses settings that many published models have, such as a
        # temperature without sampling.
        model.generation_config.to_json_file(str(partial / GENERATION_CONFIG), use_diff=True)
    if report is not None:
        text = json.dumps(_without_nonfinite(report.to_dict()), indent=1, allow_nan=False)
        _write_text(partial / REPORT, text + "\n")


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_ortho(
    path: Path, model: PreTrainedModel, layers: Mapping[str, LayerEntry], base_sha256: str
) -> str | None:
    """Write the ortho file, bound to its base; its digest, or None if there is nothing to write."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for part, full in ortho_names(name, layer).items():
            tensor = getattr(model.get_submodule(name).ortho, part)
            # A copy each: the streams are tiny, and none may share memory with another.
            tensors[full] = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not tensors:
        return None
    _write_tensors(path, tensors, {"format": FORMAT, DIGEST_KEY: base_sha256})
    path.chmod(0o600)
    return sha256_of(path)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file({name: t.cpu() for name, t in tensors.items()}, str(path), metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
