"""save_split: check -> write beside -> check what was written -> rename."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor, nn

import libortho
from libortho.alpha import ortho_layers
from libortho.checkpoint.atomic import replacing
from libortho.checkpoint.card import card_text
from libortho.checkpoint.keys import OrthoKey, ortho_access
from libortho.checkpoint.manifest import (
    FORMAT_VERSION,
    QUANT_METHOD,
    Encryption,
    FloatName,
    LayerEntry,
    Manifest,
    OrthoKind,
    OrthoManifest,
    config_digest,
)
from libortho.checkpoint.names import (
    BASE_INDEX,
    BASE_PATTERN,
    CARD,
    CONFIG,
    GENERATION_CONFIG,
    ORTHO,
    ORTHO_CONFIG,
    ORTHO_SEALED,
    PRIVATE,
    REPORT,
    PathLike,
)
from libortho.checkpoint.reports import report_text
from libortho.checkpoint.schema import read_object
from libortho.checkpoint.sealed import CIPHER, seal, sealing_key
from libortho.checkpoint.skeleton import build_skeleton, check_fit, computed_buffers
from libortho.checkpoint.streams import ortho_names, storage_of, streams_of
from libortho.checkpoint.tensorfile import METADATA, digest, read_entries, save_aligned
from libortho.checkpoint.verify import check_files, read_base
from libortho.errors import CheckpointError
from libortho.layer import OrthoLinear
from libortho.report import SeparationReport

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_SHARD_SIZE = "50GB"
"""transformers' own default."""


def save_split(
    model: PreTrainedModel,
    folder: PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: SeparationReport | None = None,
    base_model: str | None = None,
    forgotten: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    key: OrthoKey | None = None,
    stored: Mapping[str, Tensor] | None = None,
    partial: Path | None = None,
) -> None:
    """Save a split model as a folder of plain files (see the package's docstring), all or nothing.

    `model.save_pretrained(folder)` ends here too.

    Args:
        model: a transformers causal LM with `OrthoLinear` layers. Its alpha is not saved: a loaded
            model starts at 0.
        folder: new, empty, or a split checkpoint, which is then replaced with everything in it
            (and stays as it was if anything fails).
        tokenizer: saved beside the model.
        report: for `report.json` and the model card; by default what the layers know of themselves.
        base_model: for the model card, the hub's name of the model that was split.
        forgotten: for the model card, what was forgotten, in words fit for anyone who may read it.
            Nothing of the forget set is written unless it is said here.
        max_shard_size: of one file of the base, in bytes or like "5GB".
        key: encrypt the ortho stream with it; by default the one in use (`ortho_access`, or that
            of the environment), and where there is none the ortho stream is written plain.

        stored: where the model's tensors are that have no data of their own (meta device), by name.
            Each is asked for when it is written, so that no more than one file's are in memory.
        partial: where the folder is made before it takes its place; see `replacing`.

    Raises:
        TypeError: not a transformers model, or not one that its config alone rebuilds.
        ValueError: no split layer, tensors without data (meta device) that `stored` lacks, tensors
            that the config's model does not have, or an ortho stream that was left locked when it
            was loaded.
        FileExistsError: `folder` holds something other than a split checkpoint.
        OSError: it cannot be written; the disk is full, for instance.
    """
    stored = {} if stored is None else stored
    layers, kinds = _layer_entries(model)
    base, tied = _base_tensors(model, stored)
    config = _config_of(model, tied)
    _check_reloads(model, config, layers, base, tied)
    report = report or libortho.separation_report(model)
    folder = Path(folder)
    with ortho_access(key), replacing(folder, partial) as partial:
        # Before gigabytes are written: a key that cannot be read leaves nothing to write.
        key_in_use = sealing_key() if kinds else None
        _write_base(partial, base, stored, max_shard_size)
        written = read_base(partial)
        manifest = Manifest(
            quant_method=QUANT_METHOD,
            format_version=FORMAT_VERSION,
            libortho_version=libortho.__version__,
            base_sha256=digest(written),
            streams_sha256=digest(streams_of(layers, written)),
            layers=layers,
            tied=tied,
            buffer_dtypes=_buffer_dtypes(model),
        )
        config.save_pretrained(str(partial))  # what transformers makes of it is what is digested
        own = config_digest(read_object(partial / CONFIG))
        manifest = dataclasses.replace(manifest, config_sha256=own)
        config.quantization_config = manifest.to_dict()
        config.save_pretrained(str(partial))
        if kinds:
            _write_ortho(partial, model, kinds, stored, manifest, key_in_use)
        if report.layers:
            _write_text(partial / REPORT, report_text(report))
        _write_text(partial / CARD, card_text(config, report, base_model, forgotten))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        if model.generation_config is not None:
            # Not save_pretrained, which refuses settings that many published models have, such as
            # a temperature without sampling.
            model.generation_config.to_json_file(str(partial / GENERATION_CONFIG), use_diff=True)
        _set_permissions(partial)
        try:
            check_files(partial, manifest)
        except CheckpointError as error:
            raise ValueError(str(error).replace(str(partial), str(folder))) from None


def _layer_entries(
    model: PreTrainedModel,
) -> tuple[dict[str, LayerEntry], dict[str, OrthoKind]]:
    """The split layers by name, and the form of the ortho stream of those that have one."""
    from transformers import PreTrainedModel as Expected

    if not isinstance(model, Expected):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a transformers PreTrainedModel "
            "(unwrap it first)"
        )
    found = ortho_layers(model)
    for name, layer in found.items():
        if layer.ortho is None and layer.locked:
            raise ValueError(
                f"the ortho stream of {name} was left locked when the model was loaded: saving "
                "would lose it; load it with its key, or make a base-only copy (`libortho strip`)"
            )
    layers = {
        name: LayerEntry(shape=layer.base.shape, base=storage_of(layer.base, name))
        for name, layer in found.items()
    }
    return layers, {n: x.ortho.kind for n, x in found.items() if x.ortho is not None}


def _config_of(model: PreTrainedModel, tied: Mapping[str, str]) -> PreTrainedConfig:
    """The model's config, saying what is so: its dtype, its class, and whether its head is tied."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    if any(tied.get(a) != b and tied.get(b) != a for a, b in declared.items()):
        config.tie_word_embeddings = False
    return config


def _base_tensors(
    model: PreTrainedModel, stored: Container[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
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
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is no tensor: only a whole model can be saved")
        place = _place_of(tensor)
        if place in seen and isinstance(tensor, nn.Parameter):
            tied[name] = seen[place]
            continue
        if tensor.is_meta and name not in stored:
            raise ValueError(f"{name} has no data (meta device): only a whole model can be saved")
        seen[place] = name
        if tensor.is_meta:
            tensors[name] = tensor
            continue
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        # Two views of one storage are two tensors here; safetensors refuses them unless copied.
        tensors[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return tensors, tied


def _place_of(tensor: Tensor) -> object:
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    layout = (tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (tensor.device, tensor.data_ptr(), layout)


def _check_reloads(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    layers: Mapping[str, LayerEntry],
    base: Mapping[str, Tensor],
    tied: Mapping[str, str],
) -> None:
    """Raise before an hour's work is written in a form that could not be read again."""
    skeleton = build_skeleton(config)
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


def _write_base(
    partial: Path,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    max_shard_size: int | str,
) -> None:
    """The base in one file, or in shards with their index, named as transformers does."""
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern=BASE_PATTERN, max_shard_size=max_shard_size
    )
    for name, held in plan.filename_to_tensors.items():
        _write_tensors(partial / name, {tensor: tensors[tensor] for tensor in held}, stored)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_text(partial / BASE_INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")


def _write_ortho(
    partial: Path,
    model: PreTrainedModel,
    kinds: Mapping[str, OrthoKind],
    stored: Mapping[str, Tensor],
    manifest: Manifest,
    key: OrthoKey | None,
) -> None:
    """The ortho streams and their config, bound to their base."""
    tensors: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        for part, full in ortho_names(name, kind).items():
            tensor = getattr(model.get_submodule(name).ortho, part)
            # A copy each: the streams are tiny, and none may share memory with another.
            tensors[full] = tensor.detach().clone(memory_format=torch.contiguous_format)
    if key is None:
        _write_tensors(partial / ORTHO, tensors, stored)
        entries = read_entries(partial / ORTHO)
    else:
        content = save(_with_data(tensors, stored), METADATA)
        write_private(partial / ORTHO_SEALED, seal(content, key, manifest.base_sha256))
        entries = read_entries(partial / ORTHO_SEALED, content)
    ortho = OrthoManifest(
        quant_method=QUANT_METHOD,
        format_version=FORMAT_VERSION,
        libortho_version=libortho.__version__,
        base_sha256=manifest.base_sha256,
        ortho_sha256=digest(entries),
        layers=dict(kinds),
        encryption=None if key is None else Encryption(CIPHER, key.id),
    )
    write_ortho_manifest(partial, ortho)


def write_ortho_manifest(folder: Path, ortho: OrthoManifest) -> None:
    """Write `ortho_config.json`, closed to all but its owner."""
    text = json.dumps(ortho.to_dict(), indent=1) + "\n"
    write_private(folder / ORTHO_CONFIG, text.encode())


def write_private(path: Path, data: bytes) -> None:
    """Make a file that was never open to others, whatever the umask."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with open(handle, "wb") as file:
        file.write(data)
    path.chmod(0o600)  # a umask may have taken bits away


def _with_data(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: stored[n] if tensor.is_meta else tensor.cpu() for n, tensor in tensors.items()}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    save_aligned(_with_data(tensors, stored), path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _set_permissions(partial: Path) -> None:
    # safetensors creates its files closed to others; only the ortho stream's are to stay so.
    for path in partial.rglob("*"):
        if path.name in PRIVATE:
            path.chmod(0o600)
        elif path.suffix == ".safetensors":
            shutil.copymode(partial / CONFIG, path)
