"""load_split: transformers' own loader, with this package's checks and layers within it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from libortho.checkpoint.keys import OrthoKey, ortho_access
from libortho.checkpoint.manifest import read_manifest
from libortho.checkpoint.names import CONFIG, GENERATION_CONFIG, PathLike
from libortho.checkpoint.schema import blame, read_object
from libortho.errors import CheckpointError, LibOrthoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_split(
    folder: PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    key: OrthoKey | None = None,
    base_only: bool = False,
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load a split model, bit for bit as it was saved; alpha starts at 0.

    It is `AutoModelForCausalLM.from_pretrained(folder)` of a local folder, with a frozen model and
    a CheckpointError for whatever is wrong with the folder.

    Args:
        folder: written by `save_split` or `strip`. Without its ortho files every ortho stream is
            None, and an alpha above 0 raises OrthoStreamMissing.
        dtype: a floating dtype for everything that is not split (embeddings, norms, biases); the
            stored streams keep theirs. As saved by default, or where it is the config's own.
        device: where to load it, the CPU by default.
        key: of an encrypted ortho stream; by default the one in use (`ortho_access`, or that of
            the environment). It is decrypted in memory, never on a disk.
        base_only: leave an ortho stream alone, plain or encrypted: no key is needed, every ortho
            stream is None, and an alpha above 0 raises OrthoStreamMissing.
        device_map: spread the model over devices, as of `from_pretrained` (needs accelerate);
            instead of `device`.

    Returns:
        The model in eval mode, with no tensor that requires a gradient. Its attention
        implementation is transformers' default.

    Raises:
        CheckpointError: something is missing, damaged, or not of one piece; found before a weight
            is loaded. (Damage within a tensor that no split layer has is found by `verify_split`.)
        OrthoLocked: the ortho stream is encrypted, there is no key, and not `base_only`.
        OSError: a file cannot be read, for want of permission, for instance.
        TypeError: `dtype` is no floating dtype.
        ValueError: both `device` and `device_map` are given.
    """
    from transformers import AutoModelForCausalLM

    from libortho.integrations.registration import register

    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r}: expected a floating torch.dtype, or None as saved")
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of them")
    where = torch.device(device or "cpu")
    folder = Path(folder)
    read_manifest(folder)
    _check_generation_config(folder)
    register()
    try:
        with ortho_access(key, base_only):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                trust_remote_code=False,
                device_map=device_map,
            )
    except (LibOrthoError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a config or a model's class raises on a config from disk
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            raise  # torch's word for no memory on the CPU
        raise CheckpointError(
            f"{folder / CONFIG}: no causal LM can be built from it "
            f"({type(error).__name__}: {error})"
        ) from error
    model.requires_grad_(False)
    return model.to(where) if device_map is None else model  # type: ignore[arg-type]


def _check_generation_config(folder: Path) -> None:
    # transformers goes on without a generation config that it cannot read.
    path = folder / GENERATION_CONFIG
    if path.is_file():
        with blame(path):
            read_object(path)
