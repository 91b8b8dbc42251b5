"""alpha, the run-time switch of the ortho stream.

Two ways to set it, and nothing global:

- `set_alpha(model, a)` writes the *default* of this model's layers. It starts at 0, the safe state.
- `alpha_scope(model, a)` overrides it for the `with` block, in the current thread or async task
  only (a `contextvars.ContextVar`): scopes in two threads or tasks never see each other. A thread
  started inside a scope begins outside of it, that is, at the default. A generator has no context
  of its own: a scope in which it yields is refused to all others until it goes on. Enter one anew
  for each step there.

Both hold in a model compiled by `torch.compile` too: its graph asks for alpha each time it runs
(see `add_scaled`), so that no change of alpha recompiles it.

`a` is a number in [0, 1], or one value per row of the batch as a 1-D tensor or sequence. Rows are
told by the first dimension: a model that puts the length there (XLNet) takes one number only.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from libortho.suspended import Owner, owner

if TYPE_CHECKING:
    from libortho.layer import OrthoLinear

AlphaLike = float | int | Tensor | Sequence[float]


@dataclass(frozen=True, slots=True)
class Alpha:
    """A checked alpha.

    Attributes:
        rows: one value for every row when its length is 1, else one per row of the batch.
    """

    rows: tuple[float, ...]
    _tensors: dict[tuple[torch.dtype, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[type[Alpha], tuple[tuple[float, ...]]]:
        return Alpha, (self.rows,)  # a copy, or another process, makes its own tensors

    @property
    def is_zero(self) -> bool:
        """True where no row uses the ortho stream, which is then not computed at all."""
        return not any(self.rows)

    def tensor(self, batch: Tensor) -> Tensor:
        """The values as (n,), as kernels take them: fp32, or fp64 for a `batch` in fp64.

        Args:
            batch: (batch, ..., features). With several values, batch must be a multiple of their
                number: consecutive rows then share a value, which is how `generate` repeats a row
                for its beams and how models that flatten (batch, length) lay rows out.

        Raises:
            ValueError: the number of rows is not such a multiple.
        """
        if len(self.rows) > 1 and (batch.dim() < 2 or batch.shape[0] % len(self.rows)):
            raise ValueError(
                f"alpha has {len(self.rows)} values, one per row, but the batch is of shape "
                f"{tuple(batch.shape)}: its first dimension must be a multiple of that number"
            )
        dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
        found = self._tensors.get((dtype, batch.device))
        if found is None:
            # Kept for later calls, some of which may want gradients: not an inference tensor.
            with torch.inference_mode(False):
                found = torch.tensor(self.rows, dtype=dtype).to(batch.device)
            self._tensors[dtype, batch.device] = found
        return found

    def factor(self, output: Tensor) -> Tensor:
        """What every row of `output` is multiplied by.

        Args:
            output: (batch, ..., out_features); as `tensor`'s `batch`.

        Returns:
            (batch, 1, ...) of as many dimensions, fp32 or wider; (1,) for an output of one.

        Raises:
            ValueError: as `tensor`.
        """
        shape = _factor_shape(output)
        return self.tensor(output).repeat_interleave(shape[0] // len(self.rows)).reshape(shape)


def _factor_shape(output: Tensor) -> tuple[int, ...]:
    return (output.shape[0] if output.dim() > 1 else 1, *[1] * (output.dim() - 1))


ZERO = Alpha((0.0,))


def check_alpha(alpha: AlphaLike) -> Alpha:
    """Turn what a caller gives into a checked `Alpha`.

    Raises:
        ValueError: a value is NaN or outside [0, 1], or a tensor is empty or not 1-D.
        TypeError: not a number, tensor or sequence of numbers.
    """
    if isinstance(alpha, Tensor):
        if alpha.dim() > 1 or alpha.numel() == 0:
            raise ValueError(
                f"alpha of shape {tuple(alpha.shape)}: expected a number or a 1-D tensor with one "
                "value per row of the batch"
            )
        values = tuple(float(v) for v in alpha.detach().reshape(-1).double().tolist())
    elif isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
        values = (float(alpha),)
    elif isinstance(alpha, Sequence) and not isinstance(alpha, (str, bytes)) and len(alpha):
        values = tuple(v for item in alpha for v in check_alpha(item).rows)
    else:
        raise TypeError(
            f"alpha={alpha!r}: expected a number in [0, 1] or one such value per row of the batch"
        )
    for value in values:
        if math.isnan(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"alpha={value!r}: expected a value in [0, 1]")
    return Alpha(values)


class _Scope:
    """An `alpha_scope`. It holds its layers themselves, so that `in` stays meaningful."""

    __slots__ = ("alpha", "layers", "lost", "owner")

    def __init__(self, layers: frozenset[OrthoLinear], alpha: Alpha, owner: Owner | None) -> None:
        self.layers, self.alpha, self.owner = layers, alpha, owner
        self.lost = False  # it ended in another context than it began in


# Innermost scope last; a tuple, because context copies share it between tasks.
_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("libortho_alpha_scopes", default=())


def current_alpha(layer: OrthoLinear) -> Alpha:
    """The alpha that `layer` uses in this thread or task: its innermost scope's, or its default.

    Raises:
        RuntimeError: that scope is of a generator which rests at a `yield`.
    """
    for scope in reversed(_scopes.get()):
        if layer in scope.layers and not scope.lost:
            if scope.owner is not None and scope.owner.rests():
                raise RuntimeError(
                    f"the innermost alpha_scope is of the generator {scope.owner.name!r}, which "
                    "has yielded within it: code outside of it would run at its alpha. Enter the "
                    "scope anew for each step of a generator, and leave it before the yield"
                )
            return scope.alpha
    return layer.default_alpha


def ortho_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    """The split layers of a model by module name (the name is "" for a bare OrthoLinear).

    Raises:
        ValueError: the model has none, so an alpha would silently do nothing.
    """
    from libortho.layer import OrthoLinear

    found = {name: m for name, m in model.named_modules() if isinstance(m, OrthoLinear)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no OrthoLinear layer: split it first with "
            "separate_() or replace_linear_layers()"
        )
    return found


def set_alpha(model: nn.Module, alpha: AlphaLike) -> None:
    """Set the default alpha of every split layer of `model`, for all threads.

    Args:
        model: a module that holds OrthoLinear layers, or is one.
        alpha: a number in [0, 1], or one value per row of the batch.

    Raises:
        ValueError: alpha is NaN or outside [0, 1], or the model has no split layer.
        OrthoStreamMissing: alpha is above 0 and a layer has no ortho stream.
    """
    layers, checked = ortho_layers(model), check_alpha(alpha)
    for name, layer in layers.items():
        layer.require_ortho(checked, name)
    for layer in layers.values():
        layer.default_alpha = checked


@contextmanager
def alpha_scope(model: nn.Module, alpha: AlphaLike) -> Iterator[None]:
    """Use `alpha` within the block, in this thread or async task only; scopes may nest.

    In a generator, leave the block before a `yield` (while it rests there, the model raises
    RuntimeError). Gradient checkpointing computes anew in the backward pass, at the alpha of that
    moment: have it within the block, too.

    Args and raises: as `set_alpha`.
    """
    layers, checked = ortho_layers(model), check_alpha(alpha)
    for name, layer in layers.items():
        layer.require_ortho(checked, name)
    own = _Scope(frozenset(layers.values()), checked, owner())
    token = _scopes.set((*_scopes.get(), own))
    try:
        yield
    finally:
        # Generators end in any order, and an event loop closes those that were dropped in another
        # context, where what holds in this one cannot be set back.
        others = tuple(scope for scope in _scopes.get() if scope is not own)
        try:
            _scopes.reset(token)
        except ValueError:
            own.lost = True
        _scopes.set(others)


# -- inside a compiled graph ---------------------------------------------------------------------
# There, a Python value is a constant of the graph: alpha read while tracing would be frozen into
# it, or recompile it whenever it changes. So the graph holds an operator that finds the layer by
# its key and asks for its alpha when it runs, in the thread or task that runs it.

_by_key: WeakValueDictionary[int, OrthoLinear] = WeakValueDictionary()


def new_key(layer: OrthoLinear) -> Tensor:
    """What a graph finds `layer` by: () int64 on the CPU, of no other layer in any process.

    Random, since an exported graph may be loaded beside other models. A tensor, since a graph takes
    it as an input: blocks that are compiled one by one share a graph.
    """
    key = secrets.randbits(62)
    _by_key[key] = layer
    with torch.inference_mode(False):
        return torch.tensor(key, device="cpu")


# Replayed from a CUDA graph, the lookup would not happen again: whatever alpha was at the recording
# would stay. The tag keeps the operator out of such graphs.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("libortho::alpha_factor", mutates_args=(), tags=_TAGS)
def _alpha_factor(output: Tensor, key: Tensor) -> Tensor:
    layer = _by_key.get(int(key))
    if layer is None:
        raise RuntimeError("this compiled graph is of a split layer that is no more: compile again")
    return current_alpha(layer).factor(output)


@_alpha_factor.register_fake
def _(output: Tensor, key: Tensor) -> Tensor:
    dtype = torch.promote_types(output.dtype, torch.float32)
    return output.new_empty(_factor_shape(output), dtype=dtype)


def add_scaled(y: Tensor, output: Tensor, key: Tensor) -> Tensor:
    """`y + alpha * output` within a compiled graph, for the alpha of the moment it runs.

    A row at alpha 0 is `y` itself, whatever is in `output`: the graph computes the ortho stream at
    every alpha, so this is where it is kept out.

    Args:
        y, output: (batch, ..., out_features) of one dtype.
        key: of the layer, from `new_key`.
    """
    factor = _alpha_factor(output.detach(), key)
    return torch.where(factor == 0, y, y + (output * factor).to(output.dtype))
