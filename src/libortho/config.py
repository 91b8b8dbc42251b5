"""What a split is made with: frozen, versioned, and checked when made, not when used."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

CONFIG_VERSION = 1

Storage = Literal["int8", "fp16"]
Scale = Literal["absmax", "percentile"]
Svd = Literal["exact", "randomized"]
Selection = Literal["relative", "absolute", "magnitude"]
FactorDtype = Literal["float16", "bfloat16", "float32"]


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless `value` is one of a Literal's values."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")


def check_fraction(name: str, value: float, *, zero: bool = False) -> None:
    """Raise unless `value` is a number in (0, 1], or in [0, 1] with `zero`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    low_ok = value >= 0 if zero else value > 0
    if math.isnan(value) or not low_ok or value > 1:
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{name}={value!r}: expected a fraction in {interval}")


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}={value!r}: expected a finite number {'>=' if zero else '>'} 0")


def check_count(name: str, value: int, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer >= {least}")


@dataclass(frozen=True)
class BaseConfig:
    """How the dense base stream is stored.

    Attributes:
        storage: "int8", or "fp16" as mere storage (no information is removed by it).
        scale: where an int8 row's (or group's) scale comes from: "absmax" (max |w| / 127, nothing
            is clamped) or "percentile" (`percentile` of |w| over 127, the rest clamped to +-127).
        percentile: a fraction in (0, 1]; read only with scale="percentile".
        group_size: columns that share one scale; None is one scale a row. A width that the group
            size does not divide is refused when a layer is stored, naming both.
    """

    storage: Storage = "int8"
    scale: Scale = "absmax"
    percentile: float = 0.95
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("storage", self.storage, Storage)
        check_choice("scale", self.scale, Scale)
        check_fraction("percentile", self.percentile)
        if self.group_size is not None and (
            isinstance(self.group_size, bool)
            or not isinstance(self.group_size, int)
            or self.group_size < 1
        ):
            raise ValueError(f"group_size={self.group_size!r}: expected None or an integer >= 1")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready data, with its class name and the version of this module's schema."""
    plain = dataclasses.asdict(config)
    return {"config_version": CONFIG_VERSION, "kind": type(config).__name__, **plain}
