"""Solve by the saliency method: choose entries by gradients, move them, hold the retain text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.base import quantize
from libortho.base.streams import BaseStream
from libortho.data.sampling import spread
from libortho.forgetting import feedback, preservation, targets_from_earlier_model
from libortho.goal import Goal
from libortho.gradients import fisher_diagonal, with_edits
from libortho.methods.edits import parameter_budget
from libortho.methods.saliency import (
    MaskedDescent,
    SaliencyConfig,
    SparseEdit,
    saliency,
    select_entries,
)
from libortho.ortho import SparseOrtho
from libortho.report import Split
from libortho.solvers.fitting import check_finite
from libortho.solvers.problem import Problem, batches_of
from libortho.solvers.search import Standing, search, standing
from libortho.solvers.stored import as_stored, is_coarse

FISHER_TOKENS = 8_000
"""Tokens of retain and general text that the Fisher information is taken over."""


def solve_saliency(problem: Problem, method: SaliencyConfig) -> dict[str, Split]:
    """Move the most salient entries until the goal is reached, and quantise what is left.

    Raises:
        ValueError: `ortho_ratio` pays for no entry, or a loss that is not finite.
    """
    journal, goal = problem.journal, problem.goal
    assert goal is not None
    total = sum(weight.numel() for weight in problem.weights.values())
    count = parameter_budget(problem.shapes, method.ortho_ratio)
    if count < 1:
        raise ValueError(
            f"ortho_ratio={method.ortho_ratio} pays for none of the layers' {total} entries"
        )
    with journal.stage("statistics"):
        entries = _choose(problem, method, goal, count)
    with journal.stage("solve"):
        edits = _descend(problem, method, goal, entries)
    splits = {}
    with journal.stage("quantise"):
        for done, (name, weight) in enumerate(problem.weights.items()):
            journal.tell("quantise", done, len(problem.weights))
            base = _base(weight, edits[name], method)
            residual = weight.float() - base.dequantize()
            dtype = getattr(torch, method.ortho_dtype)
            splits[name] = Split(base, SparseOrtho.from_dense(residual, edits[name].mask(), dtype))
        journal.tell("quantise", len(problem.weights), len(problem.weights))
    return splits


def _base(weight: Tensor, edit: SparseEdit, method: SaliencyConfig) -> BaseStream:
    return quantize(edit.added_to(weight), method.base)


def _choose(problem: Problem, method: SaliencyConfig, goal: Goal, count: int) -> dict[str, Tensor]:
    """The entries that may be moved: exactly `count` over all layers."""
    sample = spread(problem.kept, FISHER_TOKENS)
    seen = 0

    def tick(sequences: int) -> None:
        nonlocal seen
        seen += sequences
        problem.journal.tell("statistics", seen, len(sample))

    fisher = fisher_diagonal(problem.model, problem.layers, sample, method.seed, tick)
    entries = sum(f.numel() for f in fisher.values())
    mean = sum(float(f.double().sum()) for f in fisher.values()) / entries
    if not mean > 0:
        raise ValueError(f"the retain set's mean Fisher information is {mean}")
    now = feedback(problem.model, problem.layers, problem.forget, goal.targets, {})
    scores = {}
    for name in problem.layers:  # each pair makes room for its score
        gradient, information = now.gradients.pop(name), fisher.pop(name)
        scores[name] = saliency(gradient, information, method.damping * mean)
    return select_entries(scores, count)


def _descend(
    problem: Problem, method: SaliencyConfig, goal: Goal, entries: dict[str, Tensor]
) -> dict[str, SparseEdit]:
    model, layers = problem.model, problem.layers
    descent = MaskedDescent(problem.weights, entries, method.rate)
    retain = batches_of(problem.kept, method.retain_tokens, method.seed)

    def measure(edits: Mapping[str, SparseEdit], level: float | None) -> Standing:
        found = feedback(model, layers, problem.forget, goal.targets, edits, entries=entries)
        check_finite(found, "forget")
        if is_coarse(method.base):
            bases = {n: _base(weight, edits[n], method) for n, weight in problem.weights.items()}
            with as_stored(problem, bases):
                return dataclasses.replace(standing(problem, level), gradients=found.gradients)
        if level is None:
            with with_edits(layers, edits):
                level = goal.level_beside(model)
        return Standing(found.probability, level, found.gradients)

    def advance(step: int, now: Standing) -> dict[str, SparseEdit]:
        items = next(retain)
        # The model itself, without the edits, is what retain text is held to.
        originals = targets_from_earlier_model(model, items)
        held = preservation(
            model, layers, items, originals, descent.edits(), entries=entries, cross_entropy=True
        )
        descent.step(
            {
                name: now.gradients[name] + method.retain_weight * held.gradients[name]
                for name in entries
            }
        )
        return descent.edits()

    return search(problem.journal, descent.edits(), measure, advance, method.steps)
