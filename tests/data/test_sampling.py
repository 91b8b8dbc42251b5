"""Some of many: every part of a set has its share, and no rhythm of the set is met."""

from __future__ import annotations

from collections import Counter

import pytest

from libortho.data.sampling import even_index, evenly, spread
from libortho.data.tokens import Tokens


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 3), (20, 19), (200, 40), (720, 180)])
def test_one_of_each_part_in_order(total: int, count: int) -> None:
    index = even_index(total, count)
    assert len(index) == count
    for i, at in enumerate(index):
        assert i * total // count <= at < (i + 1) * total // count


@pytest.mark.parametrize("total", [0, 1, 5])
def test_all_where_there_are_fewer(total: int) -> None:
    assert even_index(total, total) == even_index(total, 9) == list(range(total))
    assert evenly("abc", 10) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [40, 50, 100])
def test_not_the_same_questions_of_every_author(count: int) -> None:
    # ten authors with twenty questions each: every author has its share, and so has every question
    index = even_index(200, count)
    assert set(Counter(i // 20 for i in index).values()) == {count // 10}
    asked = Counter(i % 20 for i in index)
    assert len(asked) >= 18
    assert max(asked.values()) <= 2 * count / 20


def test_spread_shares_tokens_among_the_sets() -> None:
    short = [Tokens(tuple(range(10))) for _ in range(100)]
    long = [Tokens(tuple(range(100))) for _ in range(50)]
    chosen = spread([short, long], 1000)
    assert sum(len(item.ids) == 10 for item in chosen) == 50
    assert sum(len(item.ids) == 100 for item in chosen) == 5
    assert spread([short, []], 10_000) == short
    assert len(spread([long], 1)) == 1
