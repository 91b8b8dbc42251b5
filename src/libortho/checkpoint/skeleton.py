"""A model without weights: whether a checkpoint fits it, and how it takes the checkpoint's layers.

transformers builds a model on the meta device and then fills it in from files. Between the two it
hands the model over (see `integrations.transformers`), and here it gets the split layers, still
without weights, with every tensor of the dtype that it is to have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from libortho.checkpoint.manifest import LayerEntry, OrthoKind, check_config
from libortho.checkpoint.names import CONFIG
from libortho.checkpoint.reports import read_reports
from libortho.checkpoint.schema import blame, read_object
from libortho.checkpoint.streams import base_names, make_base, make_ortho, ortho_names
from libortho.checkpoint.tensorfile import DTYPES, TensorEntry, read_tensor
from libortho.checkpoint.verify import Verified, check_unchanged
from libortho.errors import CheckpointError
from libortho.layer import OrthoLinear
from libortho.linear import install, is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal LM of a config, on the meta device.

    Raises:
        ValueError: transformers has no causal LM for this config, or cannot build one from it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=False
            )
    except Exception as error:  # a model's own code, on a config from anywhere, may raise anything
        raise ValueError(
            f"no causal LM can be built from this config ({type(error).__name__}: {error})"
        ) from error
    return model


def prepare(model: PreTrainedModel, found: Verified, dtype: torch.dtype) -> None:
    """Give a model on the meta device a checkpoint's split layers, dtypes and ties, in place.

    Args:
        model: as its config builds it.
        found: the checkpoint.
        dtype: for everything that is not split. Where it is the dtype that the checkpoint was
            saved in, every tensor gets its own, which need not be that one.

    Raises:
        CheckpointError: the checkpoint's tensors are not those that this model needs, or its config
            was changed.
    """
    shapes = {name: entry.shape for name, entry in found.base_tensors.items()}
    shapes |= {name: shapes[source] for name, source in found.manifest.tied.items()}
    with blame(found.folder / CONFIG):
        check_fit(model, found.manifest.layers, shapes)
    check_config(found.folder, found.manifest)
    as_saved = dtype == saved_dtype(found)
    reports = read_reports(found.folder, found.manifest.layers)
    layers = {}
    entries = {**found.base_tensors, **found.ortho_tensors}
    # The tensors of an encrypted stream are in no file that transformers could read: see `finish`.
    readable = None if found.sealed else found.ortho
    for name in found.manifest.layers:
        layers[name] = empty_layer(
            name,
            found.manifest.layers[name],
            None if readable is None else readable.layers.get(name),
            entries,
            None if as_saved else dtype,
        )
        layers[name].report = reports.get(name)
        layers[name].locked = found.locked
    install(model, layers)
    if as_saved:
        for name, tensor in model.state_dict(keep_vars=True).items():
            entry = found.base_tensors.get(name)
            if entry is not None and DTYPES[entry.dtype] != tensor.dtype:
                _place(model, name, _empty_like(tensor, DTYPES[entry.dtype]))
    # Ties as they were saved, which may differ from what the config would tie.
    model.all_tied_weights_keys = dict(found.manifest.tied)
    # Every weight is there, so nothing needs to be initialised but computed buffers; and a model's
    # own rules for initialisation may reach for the weight of a layer that is split (GPT-2's do).
    for module in model.modules():
        if not module._non_persistent_buffers_set:
            module._is_hf_initialized = True  # type: ignore[assignment]


def finish(model: PreTrainedModel, found: Verified, dtype: torch.dtype) -> None:
    """Settle what only a model with its weights can show, and check that it has them all.

    Args:
        model: that `prepare` was given, with its weights.
        found, dtype: as of `prepare`.

    Raises:
        CheckpointError: a stream's tensor was not loaded, or not as it was stored, or not from the
            files that were checked.
    """
    check_unchanged(found)
    if found.sealed and found.ortho is not None:
        for name, kind in found.ortho.layers.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, OrthoLinear)
            parts = {
                part: read_tensor(found.ortho_tensors[full])
                for part, full in ortho_names(name, kind).items()
            }
            device = layer.base.qdata.device
            layer.ortho = make_ortho(found.manifest.layers[name], kind, parts).to(device)
    for name, entry in {**found.base_tensors, **found.ortho_tensors}.items():
        owner, _, part = name.rpartition(".")
        if not owner.endswith((".base", ".ortho")):
            continue
        tensor = getattr(model.get_submodule(owner), part)
        if tensor.is_meta or tensor.dtype != DTYPES[entry.dtype] or tensor.shape != entry.shape:
            raise CheckpointError(
                f"{entry.file}: {name} was loaded as {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}, expected {entry}; streams cannot be offloaded to disk"
            )
    if dtype == saved_dtype(found):
        for name, buffer in computed_buffers(model).items():
            wanted = found.manifest.buffer_dtypes.get(name)
            if wanted is not None:
                _place(model, name, buffer.to(getattr(torch, wanted)))


def saved_dtype(found: Verified) -> torch.dtype | None:
    """The dtype that the checkpoint's config names, which is that of the model when saved."""
    with blame(found.folder / CONFIG):
        dtype = getattr(torch, str(read_object(found.folder / CONFIG).get("dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def empty_layer(
    name: str,
    layer: LayerEntry,
    kind: OrthoKind | None,
    entries: Mapping[str, TensorEntry],
    dtype: torch.dtype | None = None,
) -> OrthoLinear:
    """A split layer without data (meta device), for the tensors that are stored of it.

    Args:
        name: of the module.
        layer, kind: forms of its base and of its ortho stream, None for a layer without.
        entries: what is stored, of this layer and any others.
        dtype: of the bias; None as it is stored.
    """
    parts = {part: _empty(entries[full]) for part, full in base_names(name, layer).items()}
    bias = entries.get(f"{name}.bias")
    ortho = None
    if kind is not None:
        names = ortho_names(name, kind)
        ortho = make_ortho(layer, kind, {p: _empty(entries[full]) for p, full in names.items()})
    return OrthoLinear.from_streams(
        make_base(layer, parts), ortho, None if bias is None else _empty(bias, dtype)
    )


def _empty(entry: TensorEntry, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(entry.shape, dtype=dtype or DTYPES[entry.dtype], device="meta")


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty_like(tensor, dtype=dtype)
    if not isinstance(tensor, nn.Parameter):
        return empty
    return nn.Parameter(empty, requires_grad=tensor.requires_grad)


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are in no state dict, since the config determines them."""
    stored = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers() if name not in stored}


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    slots: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    slots[leaf] = tensor


def check_fit(
    skeleton: nn.Module,
    layers: Mapping[str, LayerEntry],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ValueError unless stored tensors are exactly those that the skeleton needs.

    Args:
        skeleton: with its linear layers not split yet.
        layers: the split layers by name.
        shapes: stored tensors by name, tied names included.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        module = modules.get(name)
        if module is None or linear_shape(module) != layer.shape:
            found = "missing" if module is None else f"a {type(module).__name__}"
            shape = "" if module is None else f" of shape {linear_shape(module)}"
            raise ValueError(f"{name} is {found}{shape}: expected a linear layer, {layer.shape}")
        others = [other for other, m in modules.items() if m is module and other != name]
        if others:
            raise ValueError(f"{name} and {others[0]} are one module: expected a layer of its own")
        # A split layer's tensors were checked against its own shape; here they stand in for the
        # weight.
        for part in ("weight", "bias"):
            wanted.pop(f"{name}.{part}", None)
        wanted |= {n: s for n, s in shapes.items() if n.startswith(f"{name}.")}
    for name in sorted(set(wanted) | set(shapes)):
        if name not in shapes:
            raise ValueError(f"{name} is missing: the config's model has it")
        if name not in wanted:
            raise ValueError(f"{name} is unexpected: the config's model has no such tensor")
        if shapes[name] != wanted[name]:
            raise ValueError(
                f"{name} is {list(shapes[name])}, the config's model has {list(wanted[name])}"
            )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, also on the meta device; else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    if is_conv1d(module):
        return (weight.shape[1], weight.shape[0])
    return (weight.shape[0], weight.shape[1]) if isinstance(module, nn.Linear) else None
