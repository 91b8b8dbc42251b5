"""How often a fault is tried: a few times in CI, often in `make fuzz` and `make soak`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def times() -> Callable[[str, int], int]:
    """`times("FUZZ", 200)`: what LIBORTHO_FUZZ says, or 200."""
    return lambda name, few: int(os.environ.get(f"LIBORTHO_{name}", few))
