"""The baselines by name, each with its paper's settings, and one way to run any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from libortho.baselines.lora_null import METHOD, LoraNullConfig, lora_null_
from libortho.baselines.losses import NPO, RMU, GradDiff, SimNPO
from libortho.baselines.unlearn import UnlearnConfig, UnlearnOutcome, unlearn_
from libortho.data.tokens import Tokens
from libortho.report import SeparationReport
from libortho.training import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Baseline = UnlearnConfig | LoraNullConfig

BASELINES: dict[str, Callable[[], Baseline]] = {
    "graddiff": lambda: UnlearnConfig(GradDiff()),
    "npo": lambda: UnlearnConfig(NPO()),
    "simnpo": lambda: UnlearnConfig(SimNPO()),
    # Three matrices instead of a whole model move the faster.
    "rmu": lambda: UnlearnConfig(RMU(), learning_rate=5e-4),
    METHOD: LoraNullConfig,
}
"""Name -> a function that makes its config."""


def baseline(name: str) -> Baseline:
    """The config of a baseline.

    Raises:
        ValueError: no baseline has this name.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r}: expected one of {', '.join(BASELINES)}")
    return BASELINES[name]()


def run_baseline_(
    model: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    config: Baseline,
    progress: Progress | None = None,
    stop_at: float | None = None,
    state: Path | None = None,
) -> tuple[UnlearnOutcome, SeparationReport | None]:
    """`unlearn_` or `lora_null_`, as `config` says; a report where the model is split by it."""
    if isinstance(config, UnlearnConfig):
        return unlearn_(model, forget, retain, config, progress, stop_at, state), None
    outcome = lora_null_(model, forget, retain, config, progress, stop_at, state)
    return outcome.training, outcome.report
