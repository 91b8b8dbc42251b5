"""The search: stop at the level, land on it, or give the best there was."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch

from libortho.methods.edits import LowRankEdit
from libortho.solvers.problem import Journal
from libortho.solvers.search import LANDING_STEPS, Standing, search


def edit(value: float, rank: int = 1) -> dict[str, LowRankEdit]:
    """An edit that says one number."""
    return {"a": LowRankEdit(torch.full((1, rank), value), torch.ones(rank, 1))}


def probability(edits: Mapping[str, LowRankEdit]) -> float:
    """Falls with the number, 0.8 at 0."""
    return 0.8 * math.exp(-float(edits["a"].left.sum()))


class Run:
    """A search along given numbers, with what it asked."""

    def __init__(
        self,
        level: float | Callable[[float], float],
        path: list[float],
        rank: int = 1,
    ) -> None:
        self.journal = Journal()
        self.asked: list[float] = []
        self.steps: list[int] = []
        path = list(path)

        def measure(edits: Mapping[str, LowRankEdit], known: float | None) -> Standing:
            self.asked.append(probability(edits))
            moved = float(edits["a"].left.sum())
            wanted = level(moved) if callable(level) else level
            return Standing(self.asked[-1], wanted if known is None else known)

        def advance(step: int, now: Standing) -> dict[str, LowRankEdit]:
            assert now.probability == self.asked[-1]
            self.steps.append(step)
            return edit(path.pop(0) / rank, rank)

        self.found = search(self.journal, edit(0.0), measure, advance, len(path))


def test_lands_where_the_level_is_crossed() -> None:
    run = Run(0.3, [0.5, 2.5, 9.0])
    assert run.steps == [0, 1]  # nothing goes beyond the step that crosses
    crossing = math.log(0.8 / 0.3)  # 0.98, in the step from 0.5 to 2.5
    found = float(run.found["a"].left)
    assert crossing <= found <= crossing + 2.0 / 2**LANDING_STEPS
    assert probability(run.found) <= 0.3
    assert run.journal.target["steps"] == 2


def test_where_the_directions_changed_there_is_no_way_between() -> None:
    run = Run(0.3, [2.5], rank=2)
    assert float(run.found["a"].left.sum()) == pytest.approx(2.5)
    assert len(run.asked) == 2


def test_at_the_level_already() -> None:
    run = Run(0.9, [1.0])
    assert run.steps == []
    assert float(run.found["a"].left) == 0.0


def test_best_of_what_did_not_reach_it() -> None:
    run = Run(0.1, [0.5, 1.5, 1.0])
    assert run.steps == [0, 1, 2]
    assert float(run.found["a"].left) == 1.5
    assert run.journal.target["steps"] == 3


def test_a_level_that_moves_with_the_edit() -> None:
    run = Run(lambda moved: 0.3 + 0.05 * moved, [0.5, 2.5, 9.0])
    found = float(run.found["a"].left)
    # 0.425 where it was crossed, at 2.5; on the way back it is not asked again
    crossing = math.log(0.8 / 0.425)
    assert crossing <= found <= crossing + 2.0 / 2**LANDING_STEPS


@pytest.mark.parametrize("level", [math.nan, lambda moved: math.nan if moved else 0.1])
def test_level_that_is_no_number(level: float | Callable[[float], float]) -> None:
    with pytest.raises(ValueError, match="of unseen text, is NaN"):
        Run(level, [1.0])
