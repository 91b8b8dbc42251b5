"""What solvers share."""

from __future__ import annotations

from libortho.solvers.problem import batches_of


def test_batches_share_the_sets_evenly(random_tokens) -> None:
    retain, general = random_tokens([10] * 5), random_tokens([30] * 3, seed=9)
    stream = batches_of([retain, general], 120, seed=4)
    drawn = [next(stream) for _ in range(10)]
    for batch in drawn:
        assert sum(len(i.ids) for i in batch if len(i.ids) == 10) == 60
        assert sum(len(i.ids) for i in batch if len(i.ids) == 30) == 60
    flat = [item for batch in drawn for item in batch if len(item.ids) == 10]
    for start in range(0, len(flat), 5):  # each item once before any comes again
        assert len({item.ids for item in flat[start : start + 5]}) == 5
    again = batches_of([retain, general], 120, seed=4)
    assert drawn == [next(again) for _ in range(10)]
