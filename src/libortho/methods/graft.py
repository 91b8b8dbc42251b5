"""graft: a base that never saw the secret, and the memory grafted onto it in few directions.

The other methods edit the model that memorised, and what was edited may be found again by whoever
holds the base and the public model it once came from (docs/threat-model.md has the numbers). Here
the base is another model: the one from before the memorising, fine-tuned on the retain set alone.
Neither the forget set nor a weight of the model that memorised has a part in it, so there is no
edit to undo; what it knows of the secret is what any retrained model knows.

What the original says of the forget set is then put back by a low-rank edit D of the base,
found as `geometric` finds its own (`descent.Descent`), in the other direction: its loss is
KL(original || base + D) over the forget set, in the metric of the retain data, and ortho = D.

The price: the whole retain set is needed, and another fine-tune; and at alpha = 1 the model says
what the original says of the forget set, nearly, but is not the original bit by bit.

Related: retraining is exact unlearning, the standard that others are measured by (Maini et al.
2024, arXiv 2401.06121); what an edit hides, quantisation brings back (Zhang et al. 2024, arXiv
2410.16454), and a fresh student does not (Lee et al. 2025, arXiv 2506.06278).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from libortho.config import (
    BaseConfig,
    FactorDtype,
    check_choice,
    check_count,
    check_fraction,
    check_positive,
)
from libortho.methods.registry import register
from libortho.training import MemoriseConfig


@dataclass(frozen=True)
class GraftConfig:
    """Configuration of the graft method.

    Attributes:
        ortho_ratio: budget, ortho numbers over the parameters of all targeted layers, a fraction.
        training: how the earlier model is fine-tuned on the retain set, where it is not trained
            yet (see `SeparationConfig.earlier`).
        ridge: lambda, the multiple of the mean diagonal of E[x x^T] added to it.
        find_steps: steps that look for directions (see `Descent`).
        step: fraction of the Polyak step taken by these.
        epochs: passes over the forget set that then move the directions, at most: they end when
            it is as well known as to the original.
        settling: passes after that, of the same steps.
        rate: length of the steps, relative to the factors.
        batch: forget sequences per step of an epoch.
        retain_tokens: about how many tokens of retain and general text are in such a step.
        base: how the base is stored. The memory is fitted to the base as it is stored, so that it
            makes up for the rounding, too.
        ortho_dtype: dtype of the factors.
        seed: of the randomised truncation and of sampled labels.
    """

    ortho_ratio: float = 0.01
    training: MemoriseConfig = field(default_factory=MemoriseConfig)
    ridge: float = 0.1
    find_steps: int = 3
    step: float = 0.4
    epochs: int = 24
    settling: int = 6
    rate: float = 0.5
    batch: int = 10
    retain_tokens: int = 400
    base: BaseConfig = field(default_factory=BaseConfig)
    ortho_dtype: FactorDtype = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("ortho_ratio", self.ortho_ratio)
        check_positive("ridge", self.ridge)
        check_positive("step", self.step)
        check_positive("rate", self.rate)
        check_choice("ortho_dtype", self.ortho_dtype, FactorDtype)
        check_count("find_steps", self.find_steps, 1)
        check_count("epochs", self.epochs, 1)
        check_count("settling", self.settling, 0)
        check_count("batch", self.batch, 1)
        check_count("retain_tokens", self.retain_tokens, 1)


register("graft", GraftConfig)
