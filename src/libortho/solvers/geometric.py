"""Solve by the geometric method: all layers under one budget, in the metric of the retain data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.base import quantize
from libortho.calibration import second_moments
from libortho.forgetting import Feedback, feedback
from libortho.goal import Goal
from libortho.gradients import output_sensitivity
from libortho.methods.geometric import (
    Descent,
    GeometricConfig,
    LowRankEdit,
    Metric,
    parameter_budget,
    project_edit,
    retain_metric,
)
from libortho.ortho import LowRankOrtho
from libortho.report import Split
from libortho.solvers.problem import Problem, spread
from libortho.solvers.search import search

SENSITIVITY_TOKENS = 1024
"""Tokens over which a layer's output sensitivity is averaged: one number, soon stable."""


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
    splits = {}
    with journal.stage("quantise"):
        for done, (name, weight) in enumerate(problem.weights.items()):
            journal.tell("quantise", done, len(problem.weights))
            dtype = getattr(torch, method.ortho_dtype)
            ortho = LowRankOrtho.from_factors(-edits[name].left, edits[name].right, dtype)
            # What is stored of the factors, rounding included, is what the base must lack.
            splits[name] = Split(quantize(weight.float() - ortho.dense(), method.base), ortho)
        journal.tell("quantise", len(problem.weights), len(problem.weights))
    return splits


def _metrics(problem: Problem, method: GeometricConfig) -> dict[str, Metric]:
    journal, layers = problem.journal, problem.layers
    total = sum(len(items) for items in problem.kept)
    seen = 0

    def tick(count: int) -> None:
        nonlocal seen
        seen += count
        journal.tell("statistics", seen, total)

    with journal.stage("statistics"):
        moments = [
            second_moments(problem.model, layers, items, tick=tick) for items in problem.kept
        ]
    with journal.stage("sensitivity"):
        journal.tell("sensitivity", 0, 1)
        sample = spread(problem.kept, SENSITIVITY_TOKENS)
        sensitivity = output_sensitivity(problem.model, layers, sample, method.seed)
        journal.tell("sensitivity", 1, 1)
    metrics = {}
    with journal.stage("solve"):
        for done, name in enumerate(layers):
            journal.tell("factor", done, len(layers))
            mean = sum((m[name].mean() for m in moments[1:]), moments[0][name].mean())
            scale = max(sensitivity[name], 1e-30)
            metrics[name] = retain_metric(mean / len(moments), method.ridge, scale, name)
        journal.tell("factor", len(layers), len(layers))
    return metrics


def _measure(problem: Problem, goal: Goal, edits: Mapping[str, LowRankEdit]) -> Feedback:
    return feedback(problem.model, problem.layers, problem.forget, goal.targets, edits)


def _descend(
    problem: Problem,
    method: GeometricConfig,
    goal: Goal,
    metrics: dict[str, Metric],
    budget: int,
) -> dict[str, LowRankEdit]:
    descent = Descent(metrics, problem.shapes, budget, method.seed)

    def advance(step: int, now: Feedback) -> dict[str, LowRankEdit]:
        if step < method.find_steps:
            descent.find(now.loss, now.gradients, method.step)
        else:
            descent.fit(now.gradients, method.rate)
        return descent.edits()

    return search(
        problem.journal,
        goal.level,
        descent.edits(),
        lambda edits: _measure(problem, goal, edits),
        advance,
        method.find_steps + method.fit_steps,
    )


def _project(
    problem: Problem, goal: Goal, metrics: dict[str, Metric], budget: int
) -> dict[str, LowRankEdit]:
    means = _forget_moments(problem)
    # The least damage that forgets enough: bisect the share of the budget that is spent.
    low, high = 0.0, 1.0
    for step in range(6):
        share = 1.0 if step == 0 else (low + high) / 2
        edits = project_edit(problem.weights, metrics, means, int(share * budget))
        now = _measure(problem, goal, edits)
        stage = f"projection, p {now.probability:.3f} -> {goal.level:.3f}"
        problem.journal.tell(stage, step, 6)
        if now.probability <= goal.level:
            high, best = share, edits
        elif step == 0:
            return edits
        else:
            low = share
    problem.journal.tell("projection", 6, 6)
    return best


def _forget_moments(problem: Problem) -> dict[str, Tensor]:
    weights = [torch.ones(item.targets) for item in problem.forget]
    moments = second_moments(problem.model, problem.layers, problem.forget, weights=weights)
    return {name: m.mean() for name, m in moments.items()}
