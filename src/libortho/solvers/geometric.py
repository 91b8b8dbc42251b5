"""Solve by the geometric method: all layers under one budget, in the metric of the retain data."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from libortho.base import quantize
from libortho.calibration import Moments, Tick, second_moments
from libortho.config import BaseConfig, FactorDtype
from libortho.data.tokens import Tokens, spread
from libortho.forgetting import (
    Feedback,
    Target,
    feedback,
    preservation,
    targets_from_earlier_model,
)
from libortho.goal import Goal
from libortho.gradients import FactorGradient, output_sensitivity, with_edits
from libortho.gram import Gram
from libortho.linalg import WIDE
from libortho.methods.descent import Descent
from libortho.methods.edits import LowRankEdit, Metric, parameter_budget, retain_metric
from libortho.methods.geometric import GeometricConfig
from libortho.methods.projection import Projection
from libortho.ortho import LowRankOrtho
from libortho.report import Split
from libortho.scoring import answer_probability, sequence_nll
from libortho.solvers.problem import Problem, batches_of
from libortho.solvers.search import search
from libortho.solvers.spectrum import edit_spectrum
from libortho.workers import Piece, layer_groups, moments_apart

SENSITIVITY_TOKENS = 512
"""Tokens over which a layer's output sensitivity is averaged: one number, soon stable."""

FIND_TOKENS = 6_000
"""Tokens of the forget set, evenly spread, that the directions are found on."""

POOL_TOKENS = 8_000
"""Tokens of retain and general text, evenly spread, that the second phase draws from."""

WINDOW = 80
"""Longest sequence of running text there, in tokens: each of them is predicted, which is dear."""

KEEP_EVERY = 2
"""Steps that use one piece of retain text: what it says changes little from one to the next."""

NEAR = 2.0
"""Multiple of the wanted probability below which it is measured after every epoch."""

FEW = 16
"""Forget sequences up to which it is measured after every epoch in any case."""


def solve_geometric(problem: Problem, method: GeometricConfig) -> dict[str, Split]:
    """Find an edit of the least retain damage that reaches the goal, and quantise what is left.

    Raises:
        ValueError: a budget too small for one direction, or activations that are not finite.
    """
    journal, goal = problem.journal, problem.goal
    assert goal is not None
    budget = parameter_budget(problem.shapes, method.ortho_ratio)
    smallest = min(sum(shape) for shape in problem.shapes.values())
    if budget < smallest:
        raise ValueError(
            f"ortho_ratio={method.ortho_ratio} pays for {budget} numbers, fewer than one "
            f"direction of the smallest layer ({smallest})"
        )
    metrics = _metrics(problem, method)
    with journal.stage("solve"):
        if method.edit == "descent":
            edits = _descend(problem, method, goal, metrics, budget)
        else:
            edits = _project(problem, goal, metrics, budget)
    with journal.stage("spectrum"):
        journal.tell("spectrum", 0, 1)
        journal.spectrum = edit_spectrum(problem, edits, metrics)
        journal.tell("spectrum", 1, 1)
    pieces = {
        name: Piece(_quantised, (weight, edits[name], metrics[name], method), _memory(weight))
        for name, weight in problem.weights.items()
    }
    with journal.stage("quantise"):
        return _each_layer(problem, "quantise", pieces)


def _each_layer(problem: Problem, stage: str, pieces: dict[str, Piece]) -> dict[str, Any]:
    """The pieces' results by layer, in the order of the layers."""
    found: dict[str, Any] = {}
    problem.journal.tell(stage, 0, len(pieces))
    for name, result in problem.workers.each(pieces):
        found[name] = result
        problem.journal.tell(stage, len(found), len(pieces))
    return {name: found[name] for name in pieces}


def _memory(weight: Tensor) -> int:
    """Bytes that a layer's factorisation, or its quantisation, takes, about (an upper bound)."""
    rows, columns = weight.shape
    square = 4 * columns * columns
    return 16 * rows * columns + (square if columns > WIDE else 6 * square)


def _quantised(weight: Tensor, edit: LowRankEdit, metric: Metric, method: GeometricConfig) -> Split:
    moment = metric.moment() if method.base.reads_moment else None
    return edit_streams(weight, edit, method.base, method.ortho_dtype, moment)


def edit_streams(
    weight: Tensor,
    edit: LowRankEdit,
    base: BaseConfig,
    ortho_dtype: FactorDtype,
    moment: Tensor | None = None,
) -> Split:
    """base = quantise(weight + edit), ortho = -edit, for a weight (out_features, in_features).

    `moment` is for the quantiser; see `quantize`.
    """
    ortho = LowRankOrtho.from_factors(-edit.left, edit.right, getattr(torch, ortho_dtype))
    # What is stored of the factors, rounding included, is what the base must lack.
    return Split(quantize(ortho.dense().neg_().add_(weight), base, moment), ortho)


def _metrics(problem: Problem, method: GeometricConfig) -> dict[str, Metric]:
    journal, layers = problem.journal, problem.layers
    groups = layer_groups(problem.workers, problem.widths)
    total = len(groups) * sum(len(items) for items in problem.kept)
    seen = 0

    def tick(count: int) -> None:
        nonlocal seen
        seen += count
        journal.tell("statistics", seen, total)

    metrics: dict[str, Metric] = {}
    sensitivity: dict[str, float] = {}
    for group in groups:
        with journal.stage("statistics"):
            moments = _mean_moments(problem, group, tick)
        if not sensitivity:  # second: where activations are not finite, the moments name the layer
            with journal.stage("sensitivity"):
                journal.tell("sensitivity", 0, 1)
                sample = spread(problem.kept, SENSITIVITY_TOKENS)
                sensitivity = output_sensitivity(problem.model, layers, sample, method.seed)
                journal.tell("sensitivity", 1, 1)
        pieces = {
            name: Piece(
                _factored,
                (moments.pop(name), method.ridge, max(sensitivity[name], 1e-30), name),
                _memory(problem.weights[name]),
            )
            for name in group
        }
        with journal.stage("solve"):
            metrics |= _each_layer(problem, "factor", pieces)
    return metrics


def _factored(moments: Moments, ridge: float, scale: float, name: str) -> Metric:
    return retain_metric(moments.mean(), ridge, scale, name)


def _mean_moments(problem: Problem, group: Sequence[str], tick: Tick) -> dict[str, Moments]:
    """Moments of some layers; their mean is the average over the kept sets, each as weighty.

    In one sum for each layer: the sets before are counted as if they had the next one's size.
    """
    sizes = [(sum(len(i.ids) - 1 for i in items), len(items)) for items in problem.kept]
    total: dict[str, Moments] = {}
    for number, items in enumerate(problem.kept):
        if number:
            tokens, sequences = (
                new / old for new, old in zip(sizes[number], sizes[number - 1], strict=True)
            )
            for moments in total.values():
                moments.weigh_(tokens, sequences)
        total = _moments(problem, group, items, tick=tick, into=total)
    return total


def _moments(
    problem: Problem,
    group: Sequence[str],
    items: list[Tokens],
    weights: list[Tensor] | None = None,
    tick: Tick | None = None,
    into: dict[str, Moments] | None = None,
) -> dict[str, Moments]:
    """Second moments of some of the layers, by workers where they can load the model.

    They are added to `into`.
    """
    if problem.workers.model is None:
        layers = {name: problem.layers[name] for name in group}
        return second_moments(problem.model, layers, items, weights=weights, tick=tick, into=into)
    widths = {name: problem.widths[name] for name in group}
    size = sum(p.nbytes for p in problem.model.parameters())
    return moments_apart(problem.workers, widths, items, weights, tick, size, into)


def _descend(
    problem: Problem,
    method: GeometricConfig,
    goal: Goal,
    metrics: dict[str, Metric],
    budget: int,
) -> dict[str, LowRankEdit]:
    descent = Descent(metrics, problem.shapes, budget, method.seed)
    sample = spread([problem.forget], FIND_TOKENS)
    targets = dict(zip(map(id, problem.forget), goal.targets, strict=True))
    for step in range(method.find_steps):
        problem.journal.tell("find directions", step, method.find_steps)
        now = feedback(
            problem.model,
            problem.layers,
            sample,
            [targets[id(item)] for item in sample],
            descent.edits(),
        )
        if not math.isfinite(now.loss):
            raise ValueError("the forget set's loss is not finite")
        descent.find(now.loss, now.gradients, method.step)
    problem.journal.tell("find directions", method.find_steps, method.find_steps)
    fit = _Fit(problem, method, goal, descent)
    epochs = math.ceil(method.fit_steps / fit.steps)
    start = descent.edits()
    return search(
        problem.journal,
        goal.level,
        start,
        fit.measure,
        fit.epoch,
        epochs,
        fit.steps,
        # the same directions at length 0, should the first phase have gone too far
        {name: LowRankEdit(edit.left * 0, edit.right) for name, edit in start.items()},
    )


class _Fit:
    """The second phase: epochs over the forget set in small steps, each beside some retain text.

    The metric predicts retain damage from second moments; the retain text measures it.
    """

    def __init__(
        self, problem: Problem, method: GeometricConfig, goal: Goal, descent: Descent
    ) -> None:
        self._problem, self._method, self._goal, self._descent = problem, method, goal, descent
        self._order = random.Random(method.seed)
        pools = [
            spread([_windows(items)], POOL_TOKENS // len(problem.kept)) for items in problem.kept
        ]
        self._kept = batches_of(pools, method.retain_tokens, method.seed)
        self._originals: dict[int, Target] = {}
        self._keeping: Mapping[str, FactorGradient] = {}
        self._taken = 0
        self._estimate: float | None = None
        self.steps = math.ceil(len(problem.forget) / method.batch)
        """Steps of an epoch."""

    def epoch(self, number: int, now: Feedback) -> dict[str, LowRankEdit]:
        """Move the edit by one pass over the forget set."""
        forget, probabilities = self._problem.forget, []
        index = self._order.sample(range(len(forget)), len(forget))
        for step in range(self.steps):
            rows = index[step :: self.steps]
            probabilities += [self._step(rows)] * len(rows)
        self._estimate = sum(probabilities) / len(probabilities)
        return self._descent.edits()

    def _step(self, rows: list[int]) -> float:
        problem, edits = self._problem, self._descent.edits()
        forgotten = feedback(
            problem.model,
            problem.layers,
            [problem.forget[i] for i in rows],
            [self._goal.targets[i] for i in rows],
            edits,
            by="factors",
        )
        if self._taken % KEEP_EVERY == 0:
            self._keeping = self._keep(edits)
        self._taken += 1
        if not math.isfinite(forgotten.loss):
            raise ValueError("the forget set's loss is not finite")
        self._descent.fit(
            {
                name: (left + self._keeping[name][0], right + self._keeping[name][1])
                for name, (left, right) in forgotten.gradients.items()
            },
            self._method.rate,
        )
        return forgotten.probability

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
        if not math.isfinite(kept.loss):
            raise ValueError("the retain set's loss is not finite")
        return kept.gradients

    def _originals_of(self, items: list[Tokens]) -> list[Target]:
        """What the model itself says of retain text, without the edit; asked once for each."""
        new = [item for item in items if id(item) not in self._originals]
        if new:
            said = targets_from_earlier_model(self._problem.model, new)
            self._originals.update(zip(map(id, new), said, strict=True))
        return [self._originals[id(item)] for item in items]

    def measure(self, edits: Mapping[str, LowRankEdit]) -> Feedback:
        """How the forget set does with some edits.

        After an epoch that was far from the goal, what its steps saw on their way is near enough,
        unless there are so few sequences that an epoch may go all the way.
        """
        estimate, self._estimate = self._estimate, None
        few = len(self._problem.forget) <= FEW
        if estimate is None or few or estimate <= NEAR * self._goal.level:
            with with_edits(self._problem.layers, edits):
                nll = sequence_nll(self._problem.model, self._problem.forget)
            estimate = answer_probability(nll)
        return Feedback(loss=0.0, probability=estimate, nll=math.nan, gradients={})


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


def _project(
    problem: Problem, goal: Goal, metrics: dict[str, Metric], budget: int
) -> dict[str, LowRankEdit]:
    found = Projection(problem.weights, metrics, _forget_moments(problem), budget)
    # The least damage that forgets enough: bisect the share of the budget that is spent.
    low, high = 0.0, 1.0
    for step in range(6):
        share = 1.0 if step == 0 else (low + high) / 2
        edits = found.edits(int(share * budget))
        with with_edits(problem.layers, edits):
            reached = answer_probability(sequence_nll(problem.model, problem.forget))
        stage = f"projection, p {reached:.3f} -> {goal.level:.3f}"
        problem.journal.tell(stage, step, 6)
        if reached <= goal.level:
            high, best = share, edits
        elif step == 0:
            return edits
        else:
            low = share
    problem.journal.tell("projection", 6, 6)
    return best


def _forget_moments(problem: Problem) -> dict[str, Gram]:
    weights = [torch.ones(item.targets) for item in problem.forget]
    means: dict[str, Gram] = {}
    for group in layer_groups(problem.workers, problem.widths):
        moments = _moments(problem, group, problem.forget, weights)
        means |= {name: m.mean() for name, m in moments.items()}
    return means
