"""Solve by the geometric method: all layers under one budget, in the metric of the retain data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.base import quantize
from libortho.config import BaseConfig, FactorDtype
from libortho.forgetting import feedback
from libortho.goal import Goal
from libortho.gradients import with_edits
from libortho.gram import Gram
from libortho.methods.edits import LowRankEdit, Metric
from libortho.methods.geometric import GeometricConfig
from libortho.methods.projection import Projection
from libortho.ortho import LowRankOrtho
from libortho.report import Split
from libortho.solvers.fitting import Course, Fit, checked_budget, epoch_steps, find_directions
from libortho.solvers.metrics import each_layer, gather_moments, layer_memory, retain_metrics
from libortho.solvers.problem import Problem
from libortho.solvers.search import Standing, search, standing
from libortho.solvers.spectrum import edit_spectrum
from libortho.solvers.stored import as_stored, is_coarse
from libortho.workers import Piece, layer_groups

EPOCH_STEPS = 4
"""Steps of an epoch up to which each is as long as the config says. A larger forget set takes more
of them, and shorter ones, so that an epoch goes as far: there is more that may be damaged on the
way, and more retain text seen on it."""

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
    budget = checked_budget(problem, method.ortho_ratio)
    metrics = retain_metrics(problem, method.ridge, method.seed)
    with journal.stage("solve"):
        if method.edit == "descent":
            edits = _descend(problem, method, goal, metrics, budget)
        else:
            edits = _project(problem, method, metrics, budget)
    with journal.stage("spectrum"):
        journal.tell("spectrum", 0, 1)
        journal.spectrum = edit_spectrum(problem, edits, metrics)
        journal.tell("spectrum", 1, 1)
    with journal.stage("quantise"):
        return _quantise(problem, method, metrics, edits)


def _quantise(
    problem: Problem,
    method: GeometricConfig,
    metrics: Mapping[str, Metric],
    edits: Mapping[str, LowRankEdit],
) -> dict[str, Split]:
    pieces = {
        name: Piece(
            _quantise_one, (weight, edits[name], metrics[name], method), layer_memory(weight)
        )
        for name, weight in problem.weights.items()
    }
    return each_layer(problem, "quantise", pieces)


def _quantise_one(
    weight: Tensor, edit: LowRankEdit, metric: Metric, method: GeometricConfig
) -> Split:
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


def _descend(
    problem: Problem,
    method: GeometricConfig,
    goal: Goal,
    metrics: dict[str, Metric],
    budget: int,
) -> dict[str, LowRankEdit]:
    course = Course(feedback, goal.targets, problem.model)
    descent = find_directions(problem, method, course, metrics, budget)
    steps = epoch_steps(problem, method)
    length = max(1.0, steps / EPOCH_STEPS)
    fit = Fit(problem, method, course, descent)
    few = len(problem.forget) <= FEW
    start = descent.edits()

    def measure(edits: Mapping[str, LowRankEdit], level: float | None) -> Standing:
        # After an epoch that was far from the goal, what its steps saw on their way is near enough,
        # unless there are so few sequences that an epoch may go all the way.
        probability, fit.probability = fit.probability, math.nan
        if not few and probability > NEAR * goal.level:
            return Standing(probability, goal.level)
        return _standing(problem, method, metrics, edits, level)

    return search(
        problem.journal,
        start,
        measure,
        lambda epoch, now: fit.epoch(method.rate / length),
        math.ceil(method.fit_steps * length / steps),
        steps,
        # the same directions at length 0, should the first phase have gone too far
        {name: LowRankEdit(edit.left * 0, edit.right) for name, edit in start.items()},
    )


def _project(
    problem: Problem,
    method: GeometricConfig,
    metrics: dict[str, Metric],
    budget: int,
) -> dict[str, LowRankEdit]:
    found = Projection(problem.weights, metrics, _forget_moments(problem), budget)
    # The least damage that forgets enough: bisect the share of the budget that is spent.
    low, high = 0.0, 1.0
    for step in range(6):
        share = 1.0 if step == 0 else (low + high) / 2
        edits = found.edits(int(share * budget))
        now = _standing(problem, method, metrics, edits)
        stage = f"projection, p {now.probability:.3f} -> {now.level:.3f}"
        problem.journal.tell(stage, step, 6)
        if now.probability <= now.level:
            high, best = share, edits
        elif step == 0:
            return edits
        else:
            low = share
    problem.journal.tell("projection", 6, 6)
    return best


def _standing(
    problem: Problem,
    method: GeometricConfig,
    metrics: Mapping[str, Metric],
    edits: Mapping[str, LowRankEdit],
    level: float | None = None,
) -> Standing:
    """How the model does with these edits, where the base is coarse as it is stored."""
    if is_coarse(method.base):
        splits = _quantise(problem, method, metrics, edits)
        edited = as_stored(problem, {name: split.base for name, split in splits.items()})
    else:
        edited = with_edits(problem.layers, edits)
    with edited:
        return standing(problem, level)


def _forget_moments(problem: Problem) -> dict[str, Gram]:
    weights = [torch.ones(item.targets, dtype=torch.float32) for item in problem.forget]
    means: dict[str, Gram] = {}
    for group in layer_groups(problem.workers, problem.widths):
        moments = gather_moments(problem, group, problem.forget, weights)
        means |= {name: m.mean() for name, m in moments.items()}
    return means
