"""A model that never saw the forget set: made of the earlier one, and put in the original's place.

It is a function of the earlier model and the retain set alone, which is all that can be said, and
all that has to be, of what it knows of anything else.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from libortho.data.tokens import Tokens
from libortho.goal import Earlier
from libortho.training import MemoriseConfig, Progress, memorise_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_trainable(given: bool, earlier: Earlier) -> None:
    """Raise ValueError where there is no earlier model, or one that is only to be shown examples.

    Args:
        given: whether there is one.
        earlier: how it is to be asked.
    """
    if not given:
        raise ValueError(
            "before is missing: the graft method's base is made of the model from before the "
            "memorising (of the same shape), or of one that was trained without the forget set"
        )
    if earlier == "show":
        raise ValueError(
            "earlier='show': a base has to be trained, showing it examples does not last; expected "
            "'rehearse', or 'trust' for an earlier model that was trained on the retain set already"
        )


def ignorant_model(
    model: PreTrainedModel,
    before: PreTrainedModel,
    retain: Sequence[Tokens],
    training: MemoriseConfig,
    earlier: Earlier,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A copy of the earlier model, fine-tuned on the retain set where that is not done yet.

    Args:
        model: the one that memorised; only the names, shapes and dtypes of its tensors are read.
        before: the earlier model; stays as it was.
        retain: all that the model was fine-tuned on and that is to stay.
        training: the fine-tune's recipe.
        earlier: "rehearse" fine-tunes; "rehearsed" and "trust" take the earlier model as it is.
        progress: called after every step of the fine-tune.

    Returns:
        A model in evaluation mode, on the earlier model's devices, in the dtypes of `model`.

    Raises:
        ValueError: an earlier model of another shape, or one that is not whole in memory.
    """
    own, other = _tensors(model), _tensors(before)
    for name in [*own, *other]:
        shapes = [tuple(t[name].shape) if name in t else None for t in (own, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the earlier model is of another shape: {name} is {shapes[1]}, expected "
                f"{shapes[0]} as in the model that memorised"
            )
    if any(tensor.is_meta for tensors in (own, other) for tensor in tensors.values()):
        raise ValueError(
            "a model has weights on disk or beside its device, and the graft method puts one "
            "model's in the place of the other's: load both whole, without a device map that "
            "offloads"
        )
    made = copy.deepcopy(before)
    for name, tensor in _tensors(made).items():
        tensor.data = tensor.data.to(own[name].dtype)
    if earlier == "rehearse":
        memorise_(made, retain, training, progress)
    return made.eval()


def exchange_(one: nn.Module, other: nn.Module) -> None:
    """Give each of two models of the same shape the other's tensors; nothing is copied.

    Called twice, it changes nothing. Each model's tensors stay on the devices of that model.
    """
    theirs = _tensors(other)
    for name, tensor in _tensors(one).items():
        place, there = tensor.device, theirs[name].device
        tensor.data, theirs[name].data = theirs[name].data.to(place), tensor.data.to(there)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once."""
    kept = model.state_dict(keep_vars=True)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in kept.items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
