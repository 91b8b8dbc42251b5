"""The attacks by name. A further one is a file with a config and a function, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from libortho.attacks.common import AttackData, Findings, Progress, Subject
from libortho.attacks.difference import DifferenceConfig, difference
from libortho.attacks.extraction import ExtractionConfig, extraction
from libortho.attacks.membership import MembershipConfig, membership
from libortho.attacks.perturbation import PerturbationConfig, perturbation
from libortho.attacks.probes import ProbesConfig, probes
from libortho.attacks.relearning import RelearningConfig, relearning

Size = Literal["small", "full"]


@dataclass(frozen=True)
class Attack:
    """One family of attacks.

    Attributes:
        config: its frozen config class; its defaults are the full size, `small(seed)` the small.
        run: (subject, data, config, progress) -> Findings. It leaves the subject as it was.
    """

    config: Any
    run: Callable[[Subject, AttackData, Any, Progress], Findings]


ATTACKS: dict[str, Attack] = {
    "extraction": Attack(ExtractionConfig, extraction),
    "membership": Attack(MembershipConfig, membership),
    "perturbation": Attack(PerturbationConfig, perturbation),
    "relearning": Attack(RelearningConfig, relearning),
    "probes": Attack(ProbesConfig, probes),
    "difference": Attack(DifferenceConfig, difference),
}


def attack_configs(names: list[str], size: Size, seed: int = 0) -> dict[str, Any]:
    """The named attacks' configs at a size.

    Raises:
        ValueError: no such attack or size.
    """
    if size not in get_args(Size):
        raise ValueError(f"size {size!r}: expected {' or '.join(get_args(Size))}")
    configs = {}
    for name in names:
        if name not in ATTACKS:
            raise ValueError(f"attack {name!r}: expected one of {', '.join(ATTACKS)}")
        made = ATTACKS[name].config
        seeded = "seed" in made.__dataclass_fields__
        configs[name] = (
            made.small(seed) if size == "small" else made(**({"seed": seed} if seeded else {}))
        )
    return configs
