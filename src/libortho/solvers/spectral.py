"""Solve by the spectral method: every layer for itself, from its weight alone."""

from __future__ import annotations

import dataclasses
import time

from libortho.methods.spectral import SpectralConfig, rank_ratio_for, split_spectral
from libortho.report import Split
from libortho.solvers.problem import Problem


def solve_spectral(problem: Problem, method: SpectralConfig) -> dict[str, Split]:
    """Split each layer; see `split_spectral`."""
    journal, splits = problem.journal, {}
    ratios = rank_ratio_for(method.rank_ratio, list(problem.layers))
    with journal.stage("solve"):
        for done, (name, weight) in enumerate(problem.weights.items()):
            journal.tell("split layers", done, len(problem.weights))
            start = time.perf_counter()
            one = dataclasses.replace(method, rank_ratio=ratios[name])
            split = split_spectral(weight, one, name)
            splits[name] = dataclasses.replace(split, seconds=time.perf_counter() - start)
        journal.tell("split layers", len(problem.weights), len(problem.weights))
    return splits
