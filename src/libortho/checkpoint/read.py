"""load_split: verify -> build without weights -> install the split layers -> fill in the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from libortho.checkpoint.manifest import (
    BASE,
    CONFIG,
    GENERATION_CONFIG,
    ORTHO,
    LayerEntry,
    Manifest,
    PathLike,
    blame,
)
from libortho.checkpoint.skeleton import build_skeleton, check_fit, computed_buffers
from libortho.checkpoint.streams import base_names, make_base, make_ortho, ortho_names
from libortho.checkpoint.verify import opened, verify_split
from libortho.layer import OrthoLinear
from libortho.linear import install

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_split(
    folder: PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a split model, bit for bit as it was saved; alpha starts at 0.

    Args:
        folder: written by `save_split` or `base_only`. Without `ortho.safetensors` every ortho
            stream is None, and an alpha above 0 raises OrthoStreamMissing.
        dtype: a floating dtype for everything that is not split (embeddings, norms, biases); the
            stored streams keep theirs. As saved by default.
        device: where to load it, the CPU by default.

    Returns:
        The model in eval mode, with no tensor that requires a gradient. Its attention
        implementation is transformers' default.

    Raises:
        CheckpointError: something is missing, damaged, or not of one piece; found before a weight
            is loaded.
        TypeError: `dtype` is no floating dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r}: expected a floating torch.dtype, or None as saved")
    folder = Path(folder)
    where = str(torch.device(device or "cpu"))
    manifest = verify_split(folder)
    model = _skeleton_for(folder, manifest, dtype)
    layers, rest = _read(folder, manifest, where, dtype)
    install(model, layers)
    _fill(model, manifest, rest)
    if dtype is None:
        for name, buffer in computed_buffers(model).items():
            if name in manifest.buffer_dtypes:
                _place(model, name, buffer.to(getattr(torch, manifest.buffer_dtypes[name])))
    _read_generation_config(folder, model)
    model.requires_grad_(False)
    model.to(where)  # type: ignore[arg-type]  # the computed buffers; the rest is there already
    model.eval()
    return model


def _skeleton_for(folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoConfig

    with blame(folder / CONFIG):
        try:
            config = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a config class raises on a damaged file
            raise ValueError(f"not a model config ({type(error).__name__}: {error})") from error
        model = build_skeleton(config, dtype)
        shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
        shapes |= {name: shapes[source] for name, source in manifest.tied.items()}
        check_fit(model, manifest.layers, shapes)
    return model


def _read(
    folder: Path, manifest: Manifest, device: str, dtype: torch.dtype | None
) -> tuple[dict[str, OrthoLinear], dict[str, Tensor]]:
    """The split layers, and every other tensor, by name."""
    streams = {n for k, x in manifest.layers.items() for n in base_names(k, x).values()}
    with opened(folder / BASE, device) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in manifest.tensors}
    if dtype is not None:
        for name, tensor in tensors.items():
            if name not in streams and tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)
    ortho = _read_ortho(folder / ORTHO, manifest, device)
    layers = {k: _layer(k, x, tensors, ortho) for k, x in manifest.layers.items()}
    of_layers = streams | {f"{name}.bias" for name in layers}
    return layers, {name: t for name, t in tensors.items() if name not in of_layers}


def _read_ortho(path: Path, manifest: Manifest, device: str) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    with opened(path, device) as file:
        return {
            full: file.get_tensor(full)
            for name, layer in manifest.layers.items()
            for full in ortho_names(name, layer).values()
        }


def _layer(
    name: str, layer: LayerEntry, base: dict[str, Tensor], ortho: dict[str, Tensor]
) -> OrthoLinear:
    stream = None
    if layer.ortho is not None and ortho:
        parts = {part: ortho[full] for part, full in ortho_names(name, layer).items()}
        stream = make_ortho(layer, parts)
    return OrthoLinear.from_streams(
        make_base(layer, {part: base[full] for part, full in base_names(name, layer).items()}),
        stream,
        base.get(f"{name}.bias"),
        layer.report,
    )


def _fill(model: nn.Module, manifest: Manifest, rest: dict[str, Tensor]) -> None:
    # Gradients off first: assign=True makes parameters that require what those they replace did.
    model.requires_grad_(False)
    model.load_state_dict(rest, strict=False, assign=True)
    # Ties as they were saved, which may differ from what the config would tie (a split lm_head).
    for name, source in manifest.tied.items():
        _place(model, name, _find(model, source))
    empty = [n for n, t in model.state_dict().items() if t.is_meta]
    assert not empty, f"check_fit let {empty} through"


def _find(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf)
    assert isinstance(found, Tensor)
    return found


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    slots: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    slots[leaf] = tensor


def _read_generation_config(folder: Path, model: PreTrainedModel) -> None:
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return
    with blame(path):
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        except Exception as error:  # as for the model's config
            raise ValueError(f"not a generation config ({error})") from error
