"""Who does the independent pieces of a split: this process, or a cluster's.

A piece is a function with its arguments, both picklable. Whoever does it, and in whatever order,
the results are the same; whoever asks puts them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


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
    """Does pieces of work."""

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) of every piece, as they are finished."""
        ...


class ThisProcess:
    """One piece after the other, in this process."""

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) of every piece, in the order given."""
        for name, piece in pieces.items():
            yield name, piece.function(*piece.arguments)
