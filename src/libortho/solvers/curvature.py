"""Solve by the curvature method: each layer's memorised part, as much as the budget holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.base import quantize
from libortho.data.sampling import spread
from libortho.gradients import KroneckerFactors, kronecker_factors
from libortho.linalg import leading_factors
from libortho.methods.curvature import CurvatureConfig, memorised_part, sink_directions
from libortho.methods.edits import allocate, parameter_budget
from libortho.ortho import LowRankOrtho
from libortho.report import Split
from libortho.solvers.problem import Problem

CURVATURE_TOKENS = 20_000
"""Tokens of retain and general text that the two factors are taken over: with fewer than a layer is
wide, the directions that no token happened to take would look flat."""

MOST_OF_SHARE = 8
"""Directions kept of a layer until the budget is shared out, in multiples of an equal share."""


@dataclass(frozen=True)
class _Candidates:
    """A layer's memorised part D: the leading factors of it, and its norm."""

    left: Tensor
    right: Tensor
    strengths: Tensor
    norm: float


def solve_curvature(problem: Problem, method: CurvatureConfig) -> dict[str, Split]:
    """Take the memorised part out of each layer; the forget set is not looked at.

    Raises:
        ValueError: a budget too small for one direction, or statistics that are not finite.
    """
    journal, shapes = problem.journal, problem.shapes
    budget = parameter_budget(shapes, method.ortho_ratio)
    smallest = min(sum(shape) for shape in shapes.values())
    if budget < smallest:
        raise ValueError(
            f"ortho_ratio={method.ortho_ratio} pays for {budget} numbers, fewer than one "
            f"direction of the smallest layer ({smallest})"
        )
    with journal.stage("statistics"):
        factors = _factors(problem, method)
    share = budget / sum(sum(shape) for shape in shapes.values())
    most = max(16, math.ceil(MOST_OF_SHARE * share))
    found = {}
    with journal.stage("solve"):
        for done, (name, weight) in enumerate(problem.weights.items()):
            journal.tell("split layers", done, len(shapes))
            found[name] = _candidates(name, weight, factors.pop(name), method, most)
        journal.tell("split layers", len(shapes), len(shapes))
    # By squared norm per number stored: the budget then holds as much of all D as it can.
    ranks = allocate(
        {name: c.strengths.square() / sum(shapes[name]) for name, c in found.items()},
        shapes,
        budget,
    )
    splits, stored_square, square = {}, 0.0, 0.0
    with journal.stage("quantise"):
        for done, (name, weight) in enumerate(problem.weights.items()):
            journal.tell("quantise", done, len(shapes))
            candidates, rank = found.pop(name), ranks[name]
            dtype = getattr(torch, method.ortho_dtype)
            ortho = LowRankOrtho.from_factors(
                candidates.left[:, :rank], candidates.right[:rank], dtype
            )
            # The base lacks what is stored, not all of D: alpha = 1 is to restore the original.
            base = quantize(weight.float() - ortho.dense(), method.base)
            stored = float(candidates.strengths[:rank].double().square().sum())
            stored_square, square = stored_square + stored, square + candidates.norm**2
            splits[name] = Split(base, ortho, _note(math.sqrt(stored), candidates.norm))
        journal.tell("quantise", len(shapes), len(shapes))
    journal.target["stored_share"] = math.sqrt(stored_square / square) if square else 1.0
    return splits


def _note(stored: float, norm: float) -> str:
    if norm == 0:
        return "there is no memorised part"
    return (
        f"ortho holds {stored / norm:.1%} of the norm of the memorised part D; "
        "what it does not hold stays in the base"
    )


def _factors(problem: Problem, method: CurvatureConfig) -> dict[str, KroneckerFactors]:
    sample = spread(problem.kept, CURVATURE_TOKENS)
    seen = 0

    def tick(sequences: int) -> None:
        nonlocal seen
        seen += sequences
        problem.journal.tell("statistics", seen, len(sample))

    return kronecker_factors(problem.model, problem.layers, sample, method.seed, tick)


def _candidates(
    name: str, weight: Tensor, factors: KroneckerFactors, method: CurvatureConfig, most: int
) -> _Candidates:
    inputs = factors.inputs
    body = inputs.body.dense() / max(inputs.tokens, 1.0)
    sink = sink_directions(inputs.first.dense() / max(inputs.sequences, 1), body)
    try:
        part = memorised_part(weight, body, factors.outputs, method.kept_mass, sink)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    left, right, strengths = leading_factors(part, min(most, *part.shape))
    return _Candidates(left, right, strengths, float(part.norm()))
