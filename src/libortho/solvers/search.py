"""Move a model, step by step, until the forget set is as unfamiliar as it should be; no further."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from libortho.gradients import Edit
from libortho.scoring import answer_probability, sequence_nll
from libortho.solvers.problem import Journal, Problem

LANDING_STEPS = 5
"""Bisections of the last step, which would otherwise forget more than was asked for."""

E = TypeVar("E", bound=Edit)
"""A form of edit; a dictionary gives one for every module name."""


@dataclass(frozen=True)
class Standing:
    """How a model with some edits does.

    Attributes:
        probability: the forget set's per token, mean over sequences.
        level: the wanted one, which may move with the edits (see `Goal.level_beside`).
        gradients: layer -> gradient of the loss at these edits, for who advances by it.
    """

    probability: float
    level: float
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


def standing(problem: Problem, level: float | None = None) -> Standing:
    """How the problem's model does as it is now; the level is measured where it is not known."""
    assert problem.goal is not None
    probability = answer_probability(sequence_nll(problem.model, problem.forget))
    return Standing(
        probability, problem.goal.level_beside(problem.model) if level is None else level
    )


def search(
    journal: Journal,
    start: dict[str, E],
    measure: Callable[[Mapping[str, E], float | None], Standing],
    advance: Callable[[int, Standing], dict[str, E]],
    steps: int,
    counts: int = 1,
    origin: dict[str, E] | None = None,
) -> dict[str, E]:
    """Advance until the forget set's probability is at its level, then land on it.

    Args:
        journal: told of each step; `target["steps"]` becomes the number of steps taken.
        start: edits to begin with.
        measure: (edits, the level if it is known) -> how the model does with them.
        advance: (number of the step, how the present edits do) -> the next edits.
        steps: at most.
        counts: what one of these steps counts for in the report.
        origin: where `start` came from, if it may be beyond the level already.

    Returns:
        Edits that reach the level, or those of lowest probability where none did.

    Raises:
        ValueError: a probability or a level is NaN.
    """
    edits = best = start
    previous = start if origin is None else origin
    best_probability = math.inf
    for step in range(steps + 1):
        now = measure(edits, None)
        if math.isnan(now.probability) or math.isnan(now.level):
            raise ValueError("the probability of the forget set, or of unseen text, is NaN")
        stage = f"descent, probability {now.probability:.3f} -> {now.level:.3f}"
        journal.tell(stage, step, steps)
        if now.probability < best_probability:
            best, best_probability = edits, now.probability
        if now.probability <= now.level:
            best = _land(journal, now.level, previous, edits, measure)
            break
        if step == steps:
            break
        previous, edits = edits, advance(step, now)
    journal.tell(stage, steps, steps)
    journal.target["steps"] = step * counts
    return best


def _land(
    journal: Journal,
    level: float,
    before: dict[str, E],
    beyond: dict[str, E],
    measure: Callable[[Mapping[str, E], float | None], Standing],
) -> dict[str, E]:
    """The least part of the step that crossed the level which still reaches it (bisection)."""
    if not all(before[name].meets(edit) for name, edit in beyond.items()):
        return beyond  # the step chose other directions: there is no way between the two
    low, high, best = 0.0, 1.0, beyond
    for done in range(LANDING_STEPS):
        journal.tell("landing", done, LANDING_STEPS)
        share = (low + high) / 2
        edits = {name: before[name].toward(edit, share) for name, edit in beyond.items()}
        if measure(edits, level).probability <= level:
            high, best = share, edits
        else:
            low = share
    journal.tell("landing", LANDING_STEPS, LANDING_STEPS)
    return best
