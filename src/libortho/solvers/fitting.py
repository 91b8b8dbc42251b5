"""An edit by gradients: its directions found on the forget set, then moved in small steps.

What the forget set is moved towards, and what the retain text is held to, is the caller's; so the
same steps take a memory out of a model, or put one in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import nn

from libortho.data.sampling import spread
from libortho.data.tokens import Tokens
from libortho.forgetting import (
    Feedback,
    Gradients,
    Target,
    preservation,
    targets_from_earlier_model,
)
from libortho.gradients import Edit, FactorGradient
from libortho.methods.descent import Descent
from libortho.methods.edits import LowRankEdit, Metric, parameter_budget
from libortho.solvers.problem import Problem, batches_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIND_TOKENS = 6_000
"""Tokens of the forget set, evenly spread, that the directions are found on."""

WINDOW = 80
"""Longest sequence of running text there, in tokens: each of them is predicted, which is dear."""

KEEP_EVERY = 2
"""Steps that use one piece of retain text: what it says changes little from one to the next."""


class DescentConfig(Protocol):
    """What the config of a method that descends says of its steps; see `GeometricConfig`."""

    @property
    def ortho_ratio(self) -> float: ...
    @property
    def find_steps(self) -> int: ...
    @property
    def step(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def retain_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Loss(Protocol):
    """`feedback` or `restoration`: how far a set is from its targets, with the gradients."""

    def __call__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, nn.Module],
        items: Sequence[Tokens],
        targets: Sequence[Target],
        edits: Mapping[str, Edit],
        /,
        *,
        by: Gradients = "weights",
    ) -> Feedback: ...


@dataclass(frozen=True)
class Course:
    """Where an edit is to take the problem's model.

    Attributes:
        loss: of the forget set; its optimum is about 0.
        targets: of the loss, one for each forget sequence.
        original: what the model with the edit should say of retain text, this model says.
    """

    loss: Loss
    targets: Sequence[Target]
    original: PreTrainedModel


def checked_budget(problem: Problem, ortho_ratio: float) -> int:
    """Ortho numbers that may be spent.

    Raises:
        ValueError: too few for one direction of the smallest layer.
    """
    budget = parameter_budget(problem.shapes, ortho_ratio)
    smallest = min(sum(shape) for shape in problem.shapes.values())
    if budget < smallest:
        raise ValueError(
            f"ortho_ratio={ortho_ratio} pays for {budget} numbers, fewer than one "
            f"direction of the smallest layer ({smallest})"
        )
    return budget


def find_directions(
    problem: Problem,
    method: DescentConfig,
    course: Course,
    metrics: Mapping[str, Metric],
    budget: int,
) -> Descent:
    """The first phase: which directions of which layers the budget is spent on.

    Raises:
        ValueError: the loss is not finite.
    """
    descent = Descent(metrics, problem.shapes, budget, method.seed)
    sample = spread([problem.forget], FIND_TOKENS)
    targets = dict(zip(map(id, problem.forget), course.targets, strict=True))
    for step in range(method.find_steps):
        problem.journal.tell("find directions", step, method.find_steps)
        now = course.loss(
            problem.model,
            problem.layers,
            sample,
            [targets[id(item)] for item in sample],
            descent.edits(),
        )
        check_finite(now, "forget")
        descent.find(now.loss, now.gradients, method.step)
    problem.journal.tell("find directions", method.find_steps, method.find_steps)
    return descent


def epoch_steps(problem: Problem, method: DescentConfig) -> int:
    """Steps of a pass over the forget set."""
    return math.ceil(len(problem.forget) / method.batch)


class Fit:
    """The second phase: epochs over the forget set in small steps, each beside some retain text.

    The metric predicts retain damage from second moments; the retain text measures it.

    Args:
        problem: with the sets.
        method: with the sizes of the steps.
        course: where they lead.
        descent: after its first phase.

    Attributes:
        probability: the forget set's, per token, as the last epoch's steps saw it on their way.
    """

    def __init__(
        self,
        problem: Problem,
        method: DescentConfig,
        course: Course,
        descent: Descent,
    ) -> None:
        self._problem, self._course, self._descent = problem, course, descent
        self._order = random.Random(method.seed)
        pools = [_windows(items) for items in problem.kept]
        self._kept = batches_of(pools, method.retain_tokens, method.seed)
        self._originals: dict[int, Target] = {}
        self._keeping: Mapping[str, FactorGradient] = {}
        self._taken = 0
        self._steps = epoch_steps(problem, method)
        self.probability = math.nan

    def epoch(self, rate: float) -> dict[str, LowRankEdit]:
        """Move the edit by one pass over the forget set, in steps of a length `rate`."""
        forget, probabilities = self._problem.forget, []
        index = self._order.sample(range(len(forget)), len(forget))
        for step in range(self._steps):
            rows = index[step :: self._steps]
            probabilities += [self._step(rows, rate)] * len(rows)
        self.probability = sum(probabilities) / len(probabilities)
        return self._descent.edits()

    def _step(self, rows: list[int], rate: float) -> float:
        problem, edits = self._problem, self._descent.edits()
        moved = self._course.loss(
            problem.model,
            problem.layers,
            [problem.forget[i] for i in rows],
            [self._course.targets[i] for i in rows],
            edits,
            by="factors",
        )
        if self._taken % KEEP_EVERY == 0:
            self._keeping = self._keep(edits)
        self._taken += 1
        check_finite(moved, "forget")
        self._descent.fit(
            {
                name: (left + self._keeping[name][0], right + self._keeping[name][1])
                for name, (left, right) in moved.gradients.items()
            },
            rate,
        )
        return moved.probability

    def _keep(self, edits: Mapping[str, LowRankEdit]) -> Mapping[str, FactorGradient]:
        """What the next piece of retain text says of the edits."""
        items = next(self._kept)
        kept = preservation(
            self._problem.model,
            self._problem.layers,
            items,
            self._originals_of(items),
            edits,
            by="factors",
        )
        check_finite(kept, "retain")
        return kept.gradients

    def _originals_of(self, items: list[Tokens]) -> list[Target]:
        """What retain text is held to; asked once for each."""
        new = [item for item in items if id(item) not in self._originals]
        if new:
            said = targets_from_earlier_model(self._course.original, new)
            self._originals.update(zip(map(id, new), said, strict=True))
        return [self._originals[id(item)] for item in items]


def check_finite(found: Feedback, of: str) -> None:
    """Raise ValueError where the loss of the set `of` that name is NaN or Inf."""
    if not math.isfinite(found.loss):
        raise ValueError(f"the {of} set's loss is not finite")


def _windows(items: list[Tokens]) -> list[Tokens]:
    """Running text in windows; questions with their answers as they are."""
    cut: list[Tokens] = []
    for item in items:
        if item.prompt > 1 or len(item.ids) <= WINDOW:
            cut.append(item)
            continue
        parts = [item.ids[i : i + WINDOW] for i in range(0, len(item.ids), WINDOW)]
        cut += [Tokens(part) for part in parts if len(part) > 1]
    return cut
