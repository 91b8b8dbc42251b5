"""Whether a split did what was asked of it: forgotten at alpha 0, whole again at alpha 1."""

from __future__ import annotations

from collections.abc import Mapping

from libortho.alpha import alpha_scope
from libortho.goal import Aiming
from libortho.solvers import MethodConfig
from libortho.solvers.problem import Problem

MOST_ABOVE = 0.05
"""Probability above its target at which the forget set never counts as forgotten."""

MOST_BELOW = 0.02
"""Probability below the original's at which what was put back never counts as whole."""

_MENDS = {
    True: "more epochs or a larger ortho_ratio",  # what a base is grafted with
    # what other splits lose is rounding, and spectral what its rank and its budget leave out
    False: "a base that is stored finer (with spectral, a larger rank_ratio or ortho_ratio)",
}


def judge(problem: Problem, method: MethodConfig, probability: Mapping[str, float]) -> bool | None:
    """Whether enough was forgotten; the journal's target says what that is, a warning where not.

    Args:
        problem: whose model is split.
        method: by which it was.
        probability: of the forget set per token, at alpha "0.0" and "1.0"; empty without such a
            set.

    Returns:
        None where no forget set was given: nothing is claimed then.
    """
    goal, target, warnings = problem.goal, problem.journal.target, problem.journal.warnings
    if not problem.forget:
        target["aimed_at"] = "nothing: no forget set was given"
        return None
    private, full, known = probability["0.0"], probability["1.0"], problem.known
    assert known is not None
    target["original_probability"] = known
    if full < known - MOST_BELOW:
        warnings.append(
            f"the memory is NOT whole: probability per token {full:.3f} at alpha 1, of the "
            f"original {known:.3f}; {_MENDS[problem.original is not None]} would help"
        )
    if goal is not None and isinstance(method, Aiming):
        with alpha_scope(problem.model, 0.0):
            aimed, wanted = goal.source, goal.level_beside(problem.model)
        target["settled_probability"] = goal.level
        target["tolerance"] = method.tolerance
        reached = private <= wanted + min(method.tolerance * wanted, MOST_ABOVE)
    elif problem.original is not None:
        aimed, wanted = target["aimed_at"], target["probability"]
        # of a base that never saw the forget set one has to ask only whether that is true
        reached = private <= wanted + MOST_ABOVE and wanted < 0.5 * known
    else:
        # the least one can ask of a method without an aim is that something was forgotten
        aimed = "half the probability at alpha 1 (this method has no aim of its own)"
        wanted = 0.5 * full
        reached = private < wanted
    target |= {"aimed_at": aimed, "probability": wanted, "reached_probability": private}
    if not reached:
        warnings.append(
            f"the forget set is NOT forgotten: probability per token {private:.3f} "
            f"at alpha 0, aimed at {wanted:.3f}"
        )
    return reached
