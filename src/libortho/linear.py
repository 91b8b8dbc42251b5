"""Find, read and replace the linear layers of a model. Nothing that was named is ever skipped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from libortho.devices import stand_in, weights_here


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D` (GPT-2), a linear layer that stores (in, out).

    Told by its name and attributes, so that this module need not import transformers.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


LINEAR_ALIKE = ("FalconLinear",)
"""Subclasses of nn.Linear with a forward of their own that computes the same."""


def check_linear(module: nn.Module, name: str) -> None:
    """Raise TypeError unless a module computes `x @ W.T + bias`, of a weight that it has."""
    kind = type(module)
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise TypeError(
            f"{name} is a {kind.__name__}: expected a linear layer "
            "(torch.nn.Linear or transformers' Conv1D)"
        )
    if (
        isinstance(module, nn.Linear)
        and kind.forward is not nn.Linear.forward
        and kind.__name__ not in LINEAR_ALIKE
    ):
        raise TypeError(
            f"{name} is a {kind.__name__}, a linear layer that computes something else beside its "
            "weight's product, which a split would leave out: choose targets that exclude it"
        )


def read_linear(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight (out_features, in_features) and bias (out_features,) of a linear layer, detached.

    Raises:
        TypeError: neither nn.Linear nor Conv1D, one that computes more, or a quantised weight.
        ValueError: no rows or columns, still on the meta device, or NaN/Inf weights.
    """
    check_linear(module, name)
    with weights_here(module):
        weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if is_conv1d(module):
        weight = weight.T
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(f"{name} stores its weight as {weight.dtype}: expected fp16, bf16 or wider")
    if weight.is_meta:
        raise ValueError(f"{name} has no weights yet (meta device): load them first")
    if 0 in weight.shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}: a layer without rows or columns")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{name}.{label} holds {bad} NaN or Inf value(s): repair it first")
    return weight, bias.detach() if isinstance(bias, Tensor) else None


def matches(name: str, pattern: str) -> bool:
    """`pattern` is a suffix of the dotted name, at a dot, or a regular expression for all of it."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"target {pattern!r} is no regular expression: {error}") from None


def select_linear(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers that `target_modules` names, by module name, in the model's order.

    A module that stands in several places is returned once, under its first name; `install`
    replaces it in all of them.

    Args:
        model: any module.
        target_modules: suffixes of module names ("down_proj", "mlp.down_proj"), or regular
            expressions that match a whole name (r".*\\.[0-9]\\.self_attn\\.[qkvo]_proj").

    Raises:
        ValueError: no pattern, a pattern that matches nothing, a layer that is split already, or a
            weight shared with another module (which would keep what was forgotten).
        TypeError: a pattern names a module that is not linear, or fused 3-D expert weights.
    """
    from libortho.layer import OrthoLinear

    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not patterns:
        raise ValueError("target_modules is empty: name at least one layer, such as 'down_proj'")
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.pop("", None)
    selected: dict[str, nn.Module] = {}
    for pattern in patterns:
        _refuse_fused(model, pattern)
        found = [name for name in modules if matches(name, pattern)]
        if not found:
            raise ValueError(
                f"target {pattern!r} matches no module; linear layers here end in: "
                + (", ".join(_linear_suffixes(modules)) or "(there are none)")
            )
        for name in found:
            if isinstance(modules[name], OrthoLinear):
                raise ValueError(f"{name} is split already: start from the original model")
            selected[name] = modules[name]
    for name, module in selected.items():
        check_linear(module, f"{name}, which target_modules names,")
    _refuse_shared_weights(modules, selected)
    unique: dict[int, str] = {}
    for name in modules:
        if name in selected:
            unique.setdefault(id(modules[name]), name)
    return {name: modules[name] for name in unique.values()}


def _linear_suffixes(modules: Mapping[str, nn.Module]) -> list[str]:
    linear = (n for n, m in modules.items() if isinstance(m, nn.Linear) or is_conv1d(m))
    return sorted({name.rsplit(".", 1)[-1] for name in linear})


def _refuse_fused(model: nn.Module, pattern: str) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() == 3 and matches(name.removesuffix(".weight"), pattern):
            raise TypeError(
                f"target {pattern!r} matches {name}, fused expert weights of shape "
                f"{tuple(parameter.shape)}: 3-D weights cannot be split yet, and leaving them out "
                "would leak; choose targets that exclude them"
            )


def _refuse_shared_weights(
    modules: Mapping[str, nn.Module], selected: Mapping[str, nn.Module]
) -> None:
    def place(tensor: Tensor) -> tuple[bool, int]:
        # A weight that is on disk has no storage to be told by: it is shared where it is the same.
        return (tensor.is_meta, id(tensor) if tensor.is_meta else tensor.data_ptr())

    chosen = {id(module) for module in selected.values()}
    storage = {place(m.weight): name for name, m in selected.items()}  # type: ignore[arg-type]
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owner = storage.get(place(parameter))
            if owner is not None and id(module) not in chosen:
                raise ValueError(
                    f"{owner} shares its weight with {name}, which would keep what the split "
                    "removes; target another layer or untie them first"
                )


def install(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put each replacement wherever the module of that name stands, under every name it has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    old_to_new = {id(modules[name]): new for name, new in replacements.items()}
    slots: Iterable[tuple[nn.Module, str, nn.Module]] = [
        (parent, child_name, stand_in(old_to_new[id(child)], child))
        for parent in modules.values()
        for child_name, child in parent._modules.items()
        if child is not None and id(child) in old_to_new
    ]
    for parent, child_name, new in slots:
        new.train(parent.training)
        setattr(parent, child_name, new)
