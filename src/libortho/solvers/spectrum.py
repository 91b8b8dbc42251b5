"""What each direction of a low-rank split does to the forget set, and what to the retain data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.calibration import mean_squares
from libortho.data.sampling import spread
from libortho.methods.edits import LowRankEdit, Metric
from libortho.report import LayerSpectrum
from libortho.solvers.problem import Problem

SPECTRUM_TOKENS = 1_000
"""Tokens of the forget set, evenly spread, that its energy is averaged over: a picture's worth."""


def edit_spectrum(
    problem: Problem, edits: Mapping[str, LowRankEdit], metrics: Mapping[str, Metric]
) -> dict[str, LayerSpectrum]:
    """Forget and retain energy of each direction of an edit; layers without an edit are left out.

    One pass over a sample of the forget set; the retain energy is known from the metric.
    """
    directions = {
        name: principal_directions(edit, metrics[name])
        for name, edit in edits.items()
        if not edit.empty
    }
    rows = {name: rows for name, (_, rows) in directions.items()}
    sample = spread([problem.forget], SPECTRUM_TOKENS)
    squares = mean_squares(problem.model, problem.layers, rows, sample)
    spectrum = {}
    for name, (retain, _) in directions.items():
        forget = retain * squares[name]
        scale = metrics[name].scale
        spectrum[name] = LayerSpectrum(
            tuple((scale * forget).tolist()), tuple((scale * retain).tolist())
        )
    return spectrum


def principal_directions(edit: LowRankEdit, metric: Metric) -> tuple[Tensor, Tensor]:
    """An edit's directions, orthogonal in the retain metric M = L L^T.

    With the SVD D L = U S V^T, D = sum_i s_i u_i (v_i^T L^-1): direction i adds
    s_i (v_i^T L^-1 x) u_i to the layer's output.

    Returns:
        s_i^2, (rank,) in descending order: the mean square of what direction i adds on retain data,
        as the metric has it (with its ridge and first positions). And v_i^T L^-1,
        (rank, in_features): on inputs x, direction i adds s_i^2 E[(v_i^T L^-1 x)^2], so that the
        expectation is the ratio of that energy to the retain energy, a Rayleigh quotient of
        S_f v = mu M v. There are fewer directions where the rank exceeds a side of the weight.
    """
    _, r_left = torch.linalg.qr(edit.left)
    q_right, r_right = torch.linalg.qr((edit.right @ metric.factor).T)
    _, strengths, v_t = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return strengths.square(), metric.unwhiten_rows(v_t @ q_right.T)
