"""A model without weights, built from its config: every buffer real, every parameter on meta.

transformers keeps some tensors out of the state dict because the config determines them (rotary
frequencies, embedding scales). A model built wholly on the meta device would lack them, so only
the allocation of weights is diverted, and the rest of the construction runs as it always does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from libortho.checkpoint.manifest import LayerEntry
from libortho.linear import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class _WeightsOnMeta(TorchFunctionMode):
    # Layers allocate their weights with torch.empty; buffers are computed (arange, tensor, ones).
    # A torch function mode holds for this thread only, unlike a patch of nn.Module.
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM of a config, its large weights on the meta device.

    Args:
        config: not changed.
        dtype: what to build in; the config's own by default.

    Raises:
        ValueError: transformers has no causal LM for this config, or cannot build one from it.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if dtype is not None:
        config.dtype = dtype
    # Small parameters (norms) are real and may be initialised at random: leave the caller's
    # generator alone.
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _WeightsOnMeta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except Exception as error:  # a model's own code, on a config from anywhere, may raise anything
        raise ValueError(
            f"no causal LM can be built from this config ({type(error).__name__}: {error})"
        ) from error
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in stored:
            raise ValueError(
                f"{type(model).__name__} computes its buffer {name} in a way that cannot be "
                "repeated without weights: such a model cannot be loaded"
            )
    return model


def computed_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are in no state dict, since the config determines them."""
    stored = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers() if name not in stored}


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
        # A split layer's tensors were checked against its own shape; here they stand in for the
        # weight, under every name that the module has.
        for alias in [n for n, m in modules.items() if m is module]:
            for part in ("weight", "bias"):
                wanted.pop(f"{alias}.{part}", None)
            own = {n: s for n, s in shapes.items() if n.startswith(f"{name}.")}
            wanted |= {alias + n.removeprefix(name): s for n, s in own.items()}
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
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    if is_conv1d(module):
        return (weight.shape[1], weight.shape[0])
    return (weight.shape[0], weight.shape[1]) if isinstance(module, nn.Linear) else None
