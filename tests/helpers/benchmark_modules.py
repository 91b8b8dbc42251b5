"""The programs in `benchmarks/` and `experiments/`, which are no packages, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_benchmark(name: str, patch: pytest.MonkeyPatch, folder: str = "benchmarks") -> ModuleType:
    """`FOLDER/NAME.py`, for as long as the test runs."""
    place = ROOT / folder
    patch.syspath_prepend(str(place))
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", place / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, f"{name}_benchmark", module)
    spec.loader.exec_module(module)
    return module
