"""Solve by the graft method: store the base, then fit to it what the original knows beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from libortho.base import quantize
from libortho.base.streams import BaseStream
from libortho.forgetting import restoration, targets_from_earlier_model
from libortho.methods.descent import Descent
from libortho.methods.edits import Metric
from libortho.methods.graft import GraftConfig
from libortho.ortho import LowRankOrtho
from libortho.report import Split
from libortho.scoring import answer_probability, sequence_nll
from libortho.solvers.fitting import Course, Fit, checked_budget, find_directions
from libortho.solvers.metrics import retain_metrics
from libortho.solvers.problem import Problem
from libortho.solvers.spectrum import edit_spectrum

NEAR = 0.01
"""How far below the original's the forget set is known, over an epoch, when it settles."""


def solve_graft(problem: Problem, method: GraftConfig) -> dict[str, Split]:
    """Store the layers of a model that never saw the forget set, and fit the memory to them.

    Args:
        problem: its `model` is the ignorant one, `original` the one that memorised.
        method: the configuration.

    Raises:
        ValueError: a budget too small for one direction, or activations that are not finite.
    """
    journal, original = problem.journal, problem.original
    assert original is not None
    budget = checked_budget(problem, method.ortho_ratio)
    known = problem.known
    assert known is not None
    ignorant = answer_probability(sequence_nll(problem.model, problem.forget))
    metrics = retain_metrics(problem, method.ridge, method.seed)
    bases: dict[str, BaseStream] = {}
    with journal.stage("quantise"):
        for done, (name, weight) in enumerate(problem.weights.items()):
            journal.tell("quantise", done, len(problem.weights))
            moment = metrics[name].moment() if method.base.reads_moment else None
            bases[name] = quantize(weight, method.base, moment)
        journal.tell("quantise", len(bases), len(bases))
    with _as_stored(problem.weights, bases):
        with journal.stage("solve"):
            descent, epochs = _grow(problem, method, metrics, budget, known)
        edits = descent.edits()
        with journal.stage("spectrum"):
            journal.tell("spectrum", 0, 1)
            journal.spectrum = edit_spectrum(problem, edits, metrics)
            journal.tell("spectrum", 1, 1)
    journal.target |= {
        "epochs": epochs,
        "probability": ignorant,
        "aimed_at": "what a model says that was trained without the forget set",
    }
    dtype = getattr(torch, method.ortho_dtype)
    return {
        name: Split(base, LowRankOrtho.from_factors(edits[name].left, edits[name].right, dtype))
        for name, base in bases.items()
    }


@contextmanager
def _as_stored(weights: Mapping[str, Tensor], bases: Mapping[str, BaseStream]) -> Iterator[None]:
    """Within the block the weights, of a model that is whole in memory, are what is stored."""
    held = {name: weight.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.copy_(bases[name].dequantize())
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(held[name])


def _grow(
    problem: Problem,
    method: GraftConfig,
    metrics: dict[str, Metric],
    budget: int,
    known: float,
) -> tuple[Descent, int]:
    """Move the edit until the forget set is as well `known` as it was; the epochs it took, too."""
    assert problem.original is not None
    targets = targets_from_earlier_model(problem.original, problem.forget)
    course = Course(restoration, targets, problem.original)
    descent = find_directions(problem, method, course, metrics, budget)
    fit = Fit(problem, method, course, descent)
    tell, grown = problem.journal.tell, 0
    while grown < method.epochs and not fit.probability >= known - NEAR:
        said = f", probability {fit.probability:.3f} -> {known:.3f}" if grown else ""
        tell(f"graft{said}", grown, method.epochs)
        fit.epoch(method.rate)
        grown += 1
    tell("graft", method.epochs, method.epochs)
    for settled in range(method.settling):
        tell("settle", settled, method.settling)
        fit.epoch(method.rate)
    tell("settle", method.settling, method.settling)
    return descent, grown + method.settling
