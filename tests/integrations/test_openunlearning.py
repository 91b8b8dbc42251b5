"""The model class that OpenUnlearning's command is given, in a checkout of the same shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from libortho import OrthoStreamMissing, replace_linear_layers
from libortho.alpha import ortho_layers
from libortho.checkpoint import save_split, strip
from libortho.integrations.openunlearning import OrthoModel, main

# What its src/ has that matters here: a registry of models, and a script beside it.
REGISTRY = """
MODEL_REGISTRY = {}
def _register_model(model_class):
    MODEL_REGISTRY[model_class.__name__] = model_class
"""
SCRIPT = """
import sys
from model import MODEL_REGISTRY
model = MODEL_REGISTRY["OrthoModel"].from_pretrained(
    pretrained_model_name_or_path=sys.argv[1], alpha=1, torch_dtype="bfloat16", cache_dir=None
)
from libortho.alpha import ortho_layers
print(__name__, model.dtype, {layer.default_alpha.rows for layer in ortho_layers(model).values()})
"""


@pytest.fixture
def folder(families, tmp_path: Path) -> Path:
    model: Any = families["llama"].build()
    replace_linear_layers(model, "down_proj", scale="absmax")
    save_split(model, tmp_path / "split")
    return tmp_path / "split"


def test_its_script_finds_the_model(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkout" / "src"
    (source / "model").mkdir(parents=True)
    (source / "model" / "__init__.py").write_text(REGISTRY)
    (source / "eval.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "libortho.integrations.openunlearning", source / "eval.py", folder],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "__main__ torch.bfloat16 {(1.0,)}\n", done.stderr


def test_alpha(folder: Path, tmp_path: Path) -> None:
    model = OrthoModel.from_pretrained(str(folder), dtype=torch.float32)
    assert all(layer.default_alpha.is_zero for layer in ortho_layers(model).values())
    with pytest.raises(ValueError, match=r"alpha=3.*\[0, 1\]"):
        OrthoModel.from_pretrained(str(tmp_path / "nowhere"), alpha=3)
    strip(folder, tmp_path / "base")
    with pytest.raises(OrthoStreamMissing):
        OrthoModel.from_pretrained(str(tmp_path / "base"), alpha=1)


@pytest.mark.parametrize("arguments", [[], ["nowhere/eval.py"], [__file__]])
def test_another_script_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"expected src/eval\.py of a checkout"):
        main(arguments)
