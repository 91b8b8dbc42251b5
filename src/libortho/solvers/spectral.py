"""Solve by the spectral method: every layer for itself, from its weight alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from libortho.methods.spectral import SpectralConfig, rank_ratio_for, split_spectral
from libortho.report import Split
from libortho.solvers.problem import LayerSolver, Problem, timed


def spectral_layers(method: SpectralConfig, names: Sequence[str]) -> dict[str, LayerSolver]:
    """What splits each layer; see `split_spectral`."""
    ratios = rank_ratio_for(method.rank_ratio, names)
    return {
        name: partial(
            split_spectral, config=dataclasses.replace(method, rank_ratio=ratios[name]), name=name
        )
        for name in names
    }


def solve_spectral(problem: Problem, method: SpectralConfig) -> dict[str, Split]:
    """Split each layer of a model in memory."""
    journal, splits = problem.journal, {}
    solvers = spectral_layers(method, list(problem.layers))
    with journal.stage("solve"):
        for done, (name, weight) in enumerate(problem.weights.items()):
            journal.tell("split layers", done, len(problem.weights))
            splits[name] = timed(solvers[name], weight)
        journal.tell("split layers", len(problem.weights), len(problem.weights))
    return splits
