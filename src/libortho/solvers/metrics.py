"""The retain metric of every layer: its second moments gathered, weighed, and factored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from libortho.calibration import Moments, Tick, second_moments
from libortho.data.sampling import spread
from libortho.data.tokens import Tokens
from libortho.gradients import output_sensitivity
from libortho.linalg import WIDE
from libortho.methods.edits import Metric, retain_metric
from libortho.solvers.problem import Problem
from libortho.workers import Piece, layer_groups, moments_apart

SENSITIVITY_TOKENS = 512
"""Tokens over which a layer's output sensitivity is averaged: one number, soon stable."""


def retain_metrics(problem: Problem, ridge: float, seed: int) -> dict[str, Metric]:
    """Layer -> metric of the problem's kept sets, each set as weighty as the others.

    Args:
        problem: stages "statistics", "sensitivity" and "solve" of its journal are told.
        ridge: see `retain_metric`.
        seed: of sampled labels.

    Raises:
        ValueError: inputs of a layer that are zero or not finite.
    """
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
                sensitivity = output_sensitivity(problem.model, layers, sample, seed)
                journal.tell("sensitivity", 1, 1)
        pieces = {
            name: Piece(
                _factored,
                (moments.pop(name), ridge, max(sensitivity[name], 1e-30), name),
                layer_memory(problem.weights[name]),
            )
            for name in group
        }
        with journal.stage("solve"):
            metrics |= each_layer(problem, "factor", pieces)
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
        total = gather_moments(problem, group, items, tick=tick, into=total)
    return total


def gather_moments(
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


def each_layer(problem: Problem, stage: str, pieces: dict[str, Piece]) -> dict[str, Any]:
    """The pieces' results by layer, in the order of the layers."""
    found: dict[str, Any] = {}
    problem.journal.tell(stage, 0, len(pieces))
    for name, result in problem.workers.each(pieces):
        found[name] = result
        problem.journal.tell(stage, len(found), len(pieces))
    return {name: found[name] for name in pieces}


def layer_memory(weight: Tensor) -> int:
    """Bytes that a layer's factorisation, or its quantisation, takes, about (an upper bound)."""
    rows, columns = weight.shape
    square = 4 * columns * columns
    return 16 * rows * columns + (square if columns > WIDE else 6 * square)
