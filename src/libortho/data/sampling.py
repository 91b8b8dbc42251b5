"""Some of many: evenly spread over a set, and in step with nothing in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

from libortho.data.tokens import Tokens

T = TypeVar("T")

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples modulo 1 fill the unit interval as evenly as any sequence does, and never repeat
(Weyl 1916; Knuth, The Art of Computer Programming 3, section 6.4)."""


def even_index(total: int, count: int) -> list[int]:
    """Where `count` items stand (all, where there are fewer) of `total` in a row, in their order.

    The row is cut into `count` equal parts, and of each one item is taken: not always the first,
    which of twenty questions about each author, in the same order, would be the same few about all.
    """
    count = min(count, total)
    starts = [i * total // count for i in range(count)] + [total]
    return [
        start + int(i * GOLDEN % 1 * (end - start))
        for i, (start, end) in enumerate(itertools.pairwise(starts))
    ]


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items (or all, where there are fewer); see `even_index`."""
    return [items[i] for i in even_index(len(items), count)]


def spread(sets: Sequence[Sequence[Tokens]], tokens: int) -> list[Tokens]:
    """About `tokens` tokens, as many of each set, evenly spread over it; at least one sequence."""
    chosen: list[Tokens] = []
    for items in sets:
        if items:
            share = tokens / len(sets) / sum(len(item.ids) for item in items)
            chosen += evenly(items, max(1, round(share * len(items))))
    return chosen
