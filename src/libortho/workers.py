"""Who does the independent pieces of a split: this process, or a cluster's.

A piece is a function with its arguments, both picklable. Whoever does it, and in whatever order,
the results are the same; whoever asks puts them in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from libortho.calibration import Moments, Tick, second_moments
from libortho.data.tokens import Tokens, batches
from libortho.gram import CHUNK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARDS = 16
"""Most shards of a text whose statistics are gathered apart. Not a matter of how many workers there
are: the shards decide the order of a sum, and with it the last bit."""

GATHERED_BYTES = 2 * 2**30
"""Most bytes of statistics that a piece returns, unless one layer's are more. Shards that are ready
before their turn wait in the process that asked: at worst `SHARDS` times this."""


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        function, arguments: `function(*arguments)` does it.
        memory: bytes that it needs at most, about; a scheduler packs pieces by it.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: int


class Workers(Protocol):
    """Does pieces of work.

    Attributes:
        model: a name under which each worker can load the model that is split (as `load_model`
            does); None where statistics are this process's own business.
        gathered_bytes: most bytes of statistics that a piece should return; see `layer_groups`.
    """

    @property
    def model(self) -> str | None: ...

    @property
    def gathered_bytes(self) -> int: ...

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) of every piece, as they are finished."""
        ...


class ThisProcess:
    """One piece after the other, in this process."""

    model: str | None = None
    gathered_bytes = GATHERED_BYTES

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) of every piece, in the order given."""
        for name, piece in pieces.items():
            yield name, piece.function(*piece.arguments)


def layer_groups(workers: Workers, widths: Mapping[str, int]) -> list[list[str]]:
    """Layers in the groups in which their statistics are gathered, in the order given.

    A group's sums are at most `workers.gathered_bytes`, or one layer's; all layers are one group
    where this process gathers them itself. Each group takes a pass over the text. Groups change no
    bit: a layer's sums do not depend on what else is gathered.

    Args:
        widths: module name -> in_features.
    """
    if workers.model is None:
        return [list(widths)]
    groups: list[list[str]] = []
    held = 0
    for name, width in widths.items():
        size = moments_bytes(width)
        if not groups or held + size > workers.gathered_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def moments_bytes(width: int) -> int:
    """Bytes of a layer's `Moments` at most, compacted: two fp32 squares of its in_features."""
    return 2 * 4 * width * width


def moments_apart(
    workers: Workers,
    widths: Mapping[str, int],
    items: Sequence[Tokens],
    weights: Sequence[Tensor] | None = None,
    tick: Tick | None = None,
    model_bytes: int = 0,
    into: dict[str, Moments] | None = None,
) -> dict[str, Moments]:
    """`second_moments`, gathered shard by shard by workers that load the model themselves.

    A shard is a run of the batches that `second_moments` makes of the whole text, so that every
    batch is the same; the shards' sums are added in the text's order, whoever was first. Only the
    order of additions differs from one process's: about 1e-7 of the largest entry.

    Args:
        workers: with a `model`.
        widths: module name -> in_features, of the layers; a group of them (`layer_groups`).
        items, weights, tick: as of `second_moments`; `tick` after each shard.
        model_bytes: of the model, for the memory that a piece is said to need.
        into: as of `second_moments`.
    """
    index = [batch.index for batch in batches(items)]
    step = -(-len(index) // SHARDS)
    starts = range(0, len(index), step)
    shards = [list(chain.from_iterable(index[i : i + step])) for i in starts]
    # The sums and a copy on its way, rows that wait to be added, and a batch's activations beside
    # the model.
    sums = sum(2 * moments_bytes(width) + 8 * CHUNK * width for width in widths.values())
    memory = model_bytes + sums + 2**28
    pieces = {
        f"statistics {number}": Piece(
            _shard_moments,
            (
                workers.model,
                list(widths),
                [items[i] for i in rows],
                None if weights is None else [weights[i] for i in rows],
            ),
            memory,
        )
        for number, rows in enumerate(shards)
    }
    total = {} if into is None else into
    early: dict[str, dict[str, Moments]] = {}
    awaited = iter(pieces)
    next_name = next(awaited)
    for name, found in workers.each(pieces):
        early[name] = found
        if tick:
            tick(len(shards[list(pieces).index(name)]))
        while next_name in early:
            _add(total, early.pop(next_name))
            next_name = next(awaited, "")
    return total


def _add(total: dict[str, Moments], more: dict[str, Moments]) -> None:
    for name, moments in more.items():
        if name not in total:
            total[name] = moments
            continue
        total[name].add_(moments)


@functools.lru_cache(maxsize=1)
def _loaded(name: str) -> PreTrainedModel:
    from libortho.evaluation.finetuned import load_model

    return load_model(name)


def _shard_moments(
    name: str, layers: list[str], items: list[Tokens], weights: list[Tensor] | None
) -> dict[str, Moments]:
    model = _loaded(name)
    chosen = {layer: model.get_submodule(layer) for layer in layers}
    with torch.no_grad():
        found = second_moments(model, chosen, items, weights=weights)
    for moments in found.values():
        moments.compact_()
    return found
