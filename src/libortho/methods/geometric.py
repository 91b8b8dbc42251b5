"""geometric: move the forget set's predictions, orthogonally to what the retain data uses.

Orthogonal in the metric of the retain data (`edits.Metric`). Two ways to find the edit there,
`projection.Projection` and `descent.Descent`; both keep, over all layers together, the directions
with the largest singular values of D L that the budget pays for (one global threshold: ranks per
layer fall out by themselves). The ortho stream is -D, in factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from libortho.config import (
    BaseConfig,
    FactorDtype,
    check_choice,
    check_count,
    check_fraction,
    check_nll,
    check_positive,
)
from libortho.methods.registry import register

Edit = Literal["descent", "projection"]


@dataclass(frozen=True)
class GeometricConfig:
    """Configuration of the geometric method.

    Attributes:
        ortho_ratio: budget, ortho numbers over the parameters of all targeted layers, a fraction.
        edit: "descent" (default) or "projection"; see the modules of these names.
        ridge: lambda, the multiple of the mean diagonal of E[x x^T] added to it.
        find_steps: steps that look for directions (see `Descent`).
        fit_steps: steps at most that then move them, each on a batch of the forget set and one of
            the retain set; of more than four batches of the forget set, as many passes over it as
            four would take.
        step: fraction of the Polyak step taken by the first kind; small steps bend with the loss,
            large ones overshoot and pay for it in retain damage.
        rate: length of the second kind's steps, relative to the factors; shorter, in proportion,
            where a pass over the forget set takes more than four.
        batch: forget sequences per step of the second kind.
        retain_tokens: about how many tokens of retain and general text are in such a step.
        target_nll: nats per token that the forget set should cost at alpha = 0, where no earlier
            model or unseen text says it; see `separate_`.
        tolerance: how far above its target the forget probability may end, as a fraction of the
            target (and by at most 0.05 in all), before the report calls it not reached.
        base: how the base is stored; rounded against the retain metric where it reads a moment.
        ortho_dtype: dtype of the factors.
        seed: of the randomised truncation and of sampled labels.
    """

    ortho_ratio: float = 0.01
    edit: Edit = "descent"
    ridge: float = 0.1
    find_steps: int = 3
    fit_steps: int = 160
    step: float = 0.4
    rate: float = 0.4
    batch: int = 10
    retain_tokens: int = 400
    target_nll: float | None = None
    tolerance: float = 0.4
    base: BaseConfig = field(default_factory=BaseConfig)
    ortho_dtype: FactorDtype = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("ortho_ratio", self.ortho_ratio)
        check_choice("edit", self.edit, Edit)
        check_positive("ridge", self.ridge)
        check_positive("step", self.step)
        check_positive("rate", self.rate)
        check_fraction("tolerance", self.tolerance, zero=True)
        check_choice("ortho_dtype", self.ortho_dtype, FactorDtype)
        check_count("find_steps", self.find_steps, 1)
        check_count("fit_steps", self.fit_steps, 0)
        check_count("batch", self.batch, 1)
        check_count("retain_tokens", self.retain_tokens, 1)
        if self.target_nll is not None:
            check_nll("target_nll", self.target_nll)


register("geometric", GeometricConfig)
