"""Solve by the spectral method: every layer for itself, from its weight alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from libortho.methods.spectral import BLOCK_BYTES, SpectralConfig, rank_ratio_for, split_spectral
from libortho.report import Split
from libortho.solvers.problem import LayerSolver, Problem, timed
from libortho.workers import Piece


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
    journal, found = problem.journal, {}
    solvers = spectral_layers(method, list(problem.layers))
    pieces = {
        name: Piece(timed, (solvers[name], weight), spectral_memory(problem.shapes[name]))
        for name, weight in problem.weights.items()
    }
    with journal.stage("solve"):
        journal.tell("split layers", 0, len(pieces))
        for name, split in problem.workers.each(pieces):
            found[name] = split
            journal.tell("split layers", len(found), len(pieces))
    return {name: found[name] for name in pieces}


def spectral_memory(shape: tuple[int, int]) -> int:
    """Bytes that the split of a layer (out_features, in_features) takes, about (an upper bound).

    Eight fp32 copies (the weight, its low-rank part, the product that the part is made of, codes
    and temporaries), four fp32 squares of the shorter side (Gram matrix, eigenvectors, workspace),
    and blocks.
    """
    return 32 * shape[0] * shape[1] + 16 * min(shape) ** 2 + 8 * BLOCK_BYTES
