"""Split checkpoints in transformers: what `from_pretrained` and `save_pretrained` do with them.

Loading goes through transformers' registry of quantisation formats: it builds the model without
weights, `OrthoQuantizer` checks the checkpoint and puts the split layers in, and transformers fills
in base and ortho like any other tensor, with its dtypes, device maps and shards. There is no second
loader: `load_split` calls this one.

Saving has no such registry for a format of two files. `PreTrainedModel.save_pretrained` would put
the ortho streams into the file of the base, so importing this module wraps it: a model with a split
layer goes to `save_split`, and any other goes where it always went.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from libortho.checkpoint.manifest import QUANT_METHOD, Manifest, parse_manifest
from libortho.checkpoint.names import ORTHO
from libortho.checkpoint.skeleton import finish, prepare
from libortho.checkpoint.verify import Verified, check_split
from libortho.checkpoint.write import save_split
from libortho.errors import CheckpointError
from libortho.layer import OrthoLinear


@register_quantization_config(QUANT_METHOD)
class OrthoConfig(QuantizationConfigMixin):
    """The `quantization_config` of a split checkpoint.

    Attributes:
        manifest: what it says, checked.
    """

    quant_method = QUANT_METHOD  # type: ignore[assignment]  # not one of transformers' own

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @classmethod
    def from_dict(  # type: ignore[no-untyped-def]
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs
    ) -> Any:
        """From the section of a `config.json`; CheckpointError where it is none."""
        try:
            config = cls(parse_manifest(config_dict))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"quantization_config: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The section again."""
        return self.manifest.to_dict()


@register_quantizer(QUANT_METHOD)
class OrthoQuantizer(HfQuantizer):
    """What transformers' loader asks of a format; for checkpoints only, it splits nothing."""

    quantization_config: OrthoConfig
    _found: Verified
    _dtype: torch.dtype

    def __init__(self, quantization_config: OrthoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: this model is not split, and loading does not split it; "
                "call libortho.separate_() on the loaded model"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """`dtype` itself, noted; TypeError where it is not floating."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype!r}: expected a floating torch.dtype")
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a split model is loaded from its folder, not from a state_dict")
        with torch.device("cpu"):  # transformers makes every new tensor on meta at this point
            self._found = check_split(Path(checkpoint_files[0]).parent)
        if self._found.manifest != self.quantization_config.manifest:
            raise CheckpointError(
                f"{self._found.folder}: config= is of another checkpoint than the folder's own"
            )
        prepare(model, self._found, self._dtype)
        if self._found.ortho is not None and not self._found.sealed:
            # transformers reads on from this very list.
            checkpoint_files.append(str(self._found.folder / ORTHO))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        finish(model, self._found, self._dtype)
        # From here on it is a model like one that was just split. The manifest is of the files: on
        # a model that changes it would soon be wrong, and saving writes a new one.
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """By `save_split` alone, which has no need to ask."""
        return False

    @property
    def is_trainable(self) -> bool:
        """The streams are constants; adapters beside them may train."""
        return False


def _saving_splits_apart(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained`, with split models sent to `save_split`."""

    @functools.wraps(save_pretrained)
    def save(  # type: ignore[no-untyped-def]
        self: PreTrainedModel,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs,
    ) -> Any:
        split = any(isinstance(module, OrthoLinear) for module in self.modules())
        if not split or getattr(self, "_hf_peft_config_loaded", False):  # the adapter alone
            return save_pretrained(
                self,
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                push_to_hub=push_to_hub,
                max_shard_size=max_shard_size,
                variant=variant,
                **kwargs,
            )
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True would publish the ortho stream with the base: save to a folder, "
                "`libortho strip` it, and upload what that wrote"
            )
        for name, value in (("state_dict", state_dict), ("variant", variant)):
            if value is not None:
                raise ValueError(f"{name}: a split model is saved as it is, expected None")
        if is_main_process:
            save_split(self, save_directory, max_shard_size=max_shard_size)
        return None

    return save


def _refusing_splits(push_to_hub: Callable[..., Any]) -> Callable[..., Any]:
    """`push_to_hub`, which would upload all that `save_pretrained` writes."""

    @functools.wraps(push_to_hub)
    def push(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, OrthoLinear) for module in self.modules()):
            raise ValueError(
                "push_to_hub would publish the ortho stream with the base: save to a folder, "
                "`libortho strip` it, and upload what that wrote"
            )
        return push_to_hub(self, *args, **kwargs)

    return push


PreTrainedModel.save_pretrained = _saving_splits_apart(  # type: ignore[method-assign]
    PreTrainedModel.save_pretrained
)
PreTrainedModel.push_to_hub = _refusing_splits(  # type: ignore[assignment, method-assign]
    PreTrainedModel.push_to_hub
)
