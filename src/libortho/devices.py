"""Models whose layers stand on several devices, or partly on disk (accelerate's `device_map`).

accelerate gives such a model hooks that bring inputs to where a layer computes, and weights there
for as long as it does. What is here asks those hooks; without any, a layer computes where its
weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

PLACED = ("auto", "balanced", "balanced_low_0", "sequential")
"""What accelerate can do by itself."""


def check_device_map(value: str) -> str:
    """A word of accelerate's, or the name of one device.

    Raises:
        ValueError: neither.
    """
    if value in PLACED:
        return value
    try:
        torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"--device-map {value!r}: expected {', '.join(PLACED)}, or a device such as cuda:0"
        ) from None
    return value


def check_device_here(value: str) -> None:
    """As `check_device_map`, and the device, where one is named, has to be on this machine.

    Raises:
        ValueError: it is not.
    """
    if check_device_map(value) in PLACED:
        return
    try:
        torch.empty(0, device=value)
    except (AssertionError, RuntimeError) as error:  # the first: torch is built without such
        why = str(error).partition("\n")[0]
        raise ValueError(f"--device-map {value!r}: there is no such device here ({why})") from None


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, and so where its inputs have to be."""
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(chain(module.parameters(), module.buffers())).device  # a split layer has buffers


def offloaded(model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors that are not on the model itself, by name; each is read when it is asked for."""
    for module in model.modules():
        for hook in _hooks(module):
            if hook.offload and hook.weights_map is not None:
                held: Mapping[str, Tensor] = hook.weights_map.dataset
                return held
    return {}


@contextmanager
def weights_here(module: nn.Module) -> Iterator[None]:
    """Have the weights of a layer of an offloaded model where it computes, within the block."""
    context: Any = nullcontext()
    if any(hook.offload for hook in _hooks(module)):
        from accelerate.utils import align_module_device

        context = align_module_device(module)
    with context:
        yield


def stand_in(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new`, with its inputs brought to where `old` has them, unless it has hooks of its own.

    A layer without data, of a model that is only written, has no inputs.
    """
    held = chain(new.parameters(), new.buffers())
    if _hooks(old) and not _hooks(new) and not any(part.is_meta for part in held):
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        (hook,) = _hooks(old)
        moved = AlignDevicesHook(
            hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys
        )
        add_hook_to_module(new, moved)
    return new


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module that say where it computes."""
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", [hook]) if hasattr(h, "execution_device")]
