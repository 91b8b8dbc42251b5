"""What a split is made with: frozen, versioned, and checked when made, not when used."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

CONFIG_VERSION = 1

INT4_GROUP = 64
"""Columns that share a scale and a zero point with INT4, unless `group_size` says otherwise."""

Storage = Literal["int8", "int4", "fp16"]
Scale = Literal["absmax", "percentile", "search"]
Rounding = Literal["nearest", "error_feedback"]
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


MOST_NLL = 30.0
"""Nats per token that may be aimed at: a probability of 1e-13, to which targets are clamped."""


def check_nll(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above 0 and at most `MOST_NLL`."""
    check_positive(name, value)
    if value > MOST_NLL:
        raise ValueError(f"{name}={value!r}: expected at most {MOST_NLL:g} nats per token")


def check_count(name: str, value: int, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer >= {least}")


@dataclass(frozen=True)
class BaseConfig:
    """How the dense base stream is stored.

    Attributes:
        storage: "int8" (symmetric), "int4" (a scale and a zero point a group, two weights to a
            byte), or "fp16" as mere storage (no information is removed by it).
        scale: where the range of a row (or group) of codes comes from: "absmax" (its largest |w|,
            or with int4 its smallest and largest w: nothing is clamped), "percentile" (int8 only:
            `percentile` of |w| over 127, the rest clamped to +-127) or "search" (the ends clipped
            by whatever leaves the least squared error, see `choose_grid`). None, replaced when the
            config is made, is "search" for int4 and "absmax" otherwise.
        percentile: a fraction in (0, 1]; read only with scale="percentile".
        group_size: columns that share one scale. None is one scale a row, and for int4, where it
            is replaced when the config is made, 64 columns. A width that the group size does not
            divide is refused when a layer is stored, naming both.
        rounding: "nearest", or "error_feedback", which rounds against the second moment of the
            layer's inputs and so needs one (see `quantize`). None is error feedback for int4 where
            a moment is given, and nearest otherwise.
    """

    storage: Storage = "int8"
    scale: Scale | None = None
    percentile: float = 0.95
    group_size: int | None = None
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        check_choice("storage", self.storage, Storage)
        if self.scale is None:
            object.__setattr__(self, "scale", "search" if self.storage == "int4" else "absmax")
        check_choice("scale", self.scale, Scale)
        if self.storage == "int4" and self.scale == "percentile":
            raise ValueError(
                "scale='percentile' with storage='int4': a percentile range is for int8; expected "
                "'search' or 'absmax'"
            )
        if self.rounding is not None:
            check_choice("rounding", self.rounding, Rounding)
        if self.storage == "fp16" and self.rounding == "error_feedback":
            raise ValueError(
                "rounding='error_feedback' with storage='fp16': expected int8 or int4, or "
                "rounding=None"
            )
        check_fraction("percentile", self.percentile)
        if self.storage == "int4" and self.group_size is None:
            object.__setattr__(self, "group_size", INT4_GROUP)
        if self.group_size is not None and (
            isinstance(self.group_size, bool)
            or not isinstance(self.group_size, int)
            or self.group_size < 1
        ):
            raise ValueError(f"group_size={self.group_size!r}: expected None or an integer >= 1")

    @property
    def reads_moment(self) -> bool:
        """Whether `quantize` makes use of a moment: for error feedback, or to weigh a search."""
        if self.storage == "fp16":
            return False
        feeds_back = self.rounding == "error_feedback" or (
            self.rounding is None and self.storage == "int4"
        )
        return feeds_back or self.scale == "search"


def check_takes_no_moment(base: BaseConfig, method: str) -> None:
    """Raise ValueError if a base wants what a method cannot give it: a moment of the inputs."""
    if base.rounding == "error_feedback":
        raise ValueError(
            "base.rounding='error_feedback' needs a second moment of the layers' inputs, and the "
            f"{method} method takes none: expected 'nearest' or None"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready data, with its class name and the version of this module's schema."""
    plain = dataclasses.asdict(config)
    return {"config_version": CONFIG_VERSION, "kind": type(config).__name__, **plain}
