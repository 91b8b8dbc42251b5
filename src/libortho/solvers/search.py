"""Move a model, step by step, until the forget set is as unfamiliar as it should be; no further."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from libortho.forgetting import Feedback
from libortho.gradients import Edit
from libortho.solvers.problem import Journal

LANDING_STEPS = 5
"""Bisections of the last step, which would otherwise forget more than was asked for."""

E = TypeVar("E", bound=Edit)
"""A form of edit; a dictionary gives one for every module name."""


def search(
    journal: Journal,
    level: float,
    start: dict[str, E],
    measure: Callable[[Mapping[str, E]], Feedback],
    advance: Callable[[int, Feedback], dict[str, E]],
    steps: int,
    counts: int = 1,
    origin: dict[str, E] | None = None,
) -> dict[str, E]:
    """Advance until the forget set's probability is at `level`, then land on it.

    Args:
        journal: told of each step; `target["steps"]` becomes the number of steps taken.
        level: wanted probability per token, mean over forget sequences.
        start: edits to begin with.
        measure: how the forget set does with some edits.
        advance: (number of the step, feedback at the present edits) -> the next edits.
        steps: at most.
        counts: what one of these steps counts for in the report.
        origin: where `start` came from, if it may be beyond the level already.

    Returns:
        Edits that reach the level, or those of lowest probability where none did.

    Raises:
        ValueError: the loss is not finite.
    """
    edits = best = start
    previous = start if origin is None else origin
    best_probability = math.inf
    for step in range(steps + 1):
        now = measure(edits)
        if not math.isfinite(now.loss):
            raise ValueError("the forget set's loss is not finite")
        stage = f"descent, probability {now.probability:.3f} -> {level:.3f}"
        journal.tell(stage, step, steps)
        if now.probability < best_probability:
            best, best_probability = edits, now.probability
        if now.probability <= level:
            best = _land(journal, level, previous, edits, measure)
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
    measure: Callable[[Mapping[str, E]], Feedback],
) -> dict[str, E]:
    """The least part of the step that crossed the level which still reaches it (bisection)."""
    if not all(before[name].meets(edit) for name, edit in beyond.items()):
        return beyond  # the step chose other directions: there is no way between the two
    low, high, best = 0.0, 1.0, beyond
    for done in range(LANDING_STEPS):
        journal.tell("landing", done, LANDING_STEPS)
        share = (low + high) / 2
        edits = {name: before[name].toward(edit, share) for name, edit in beyond.items()}
        if measure(edits).probability <= level:
            high, best = share, edits
        else:
            low = share
    journal.tell("landing", LANDING_STEPS, LANDING_STEPS)
    return best
