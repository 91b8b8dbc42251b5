"""The geometric method's config."""

from __future__ import annotations

import math

import pytest

from libortho import GeometricConfig


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ortho_ratio", 0.0, ValueError),
        ("ortho_ratio", 1.01, ValueError),
        ("ortho_ratio", math.nan, ValueError),
        ("ortho_ratio", "1%", TypeError),
        ("edit", "ascent", ValueError),
        ("ridge", 0.0, ValueError),
        ("ridge", math.inf, ValueError),
        ("step", -1.0, ValueError),
        ("tolerance", 1.5, ValueError),
        ("ortho_dtype", "int8", ValueError),
        ("target_nll", 0.0, ValueError),
        ("target_nll", 30.5, ValueError),
        ("target_nll", True, TypeError),
    ],
)
def test_config_errors_name_the_field(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=field):
        GeometricConfig(**{field: value})
