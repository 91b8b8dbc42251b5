"""Which solver runs which method, on a model.

A method (`libortho.methods`) is mathematics on weights and statistics. Its solver here knows a
model: it gathers the statistics, runs the method until the goal is reached, and quantises. Both are
one file of the same name; `SOLVERS` below is the only place where a solver is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from libortho.methods.curvature import CurvatureConfig
from libortho.methods.geometric import GeometricConfig
from libortho.methods.graft import GraftConfig
from libortho.methods.saliency import SaliencyConfig
from libortho.methods.spectral import SpectralConfig
from libortho.report import Split
from libortho.solvers.curvature import solve_curvature
from libortho.solvers.geometric import solve_geometric
from libortho.solvers.graft import solve_graft
from libortho.solvers.problem import LayerSolver, Problem
from libortho.solvers.saliency import solve_saliency
from libortho.solvers.spectral import solve_spectral, spectral_layers

MethodConfig = GeometricConfig | GraftConfig | SaliencyConfig | CurvatureConfig | SpectralConfig


@dataclass(frozen=True)
class Solver:
    """How a method is run.

    Attributes:
        solve: (problem, the method's config) -> module name -> its two streams; `problem` and the
            model stay as they are.
        general: it looks at general text beside the retain set.
        forget_optional: it does without a forget set.
        moments: it reads moments of what goes into a layer, which are not gathered of the model's
            output layer: that is handed the positions that predict alone.
        shares: it hands independent work to a problem's workers.
        by_layer: (the method's config, module names) -> what splits each of them from its weight
            alone; None for a method that has to run the model.
    """

    solve: Callable[[Problem, Any], dict[str, Split]]
    general: bool = True
    forget_optional: bool = False
    moments: bool = False
    shares: bool = False
    by_layer: Callable[[Any, Sequence[str]], dict[str, LayerSolver]] | None = None


SOLVERS: dict[type, Solver] = {
    GeometricConfig: Solver(solve_geometric, moments=True, shares=True),
    GraftConfig: Solver(solve_graft, moments=True),
    SaliencyConfig: Solver(solve_saliency),
    CurvatureConfig: Solver(solve_curvature, forget_optional=True, moments=True),
    SpectralConfig: Solver(solve_spectral, general=False, shares=True, by_layer=spectral_layers),
}
