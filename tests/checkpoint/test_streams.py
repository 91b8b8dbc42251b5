"""The streams' tensors: shapes, dtypes and indices that do not fit are errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from libortho import BaseConfig, CheckpointError
from libortho.checkpoint import load_split, save_split

LAYER = "model.layers.0.mlp.down_proj"


Change = Callable[[dict[str, torch.Tensor]], Any]


def _put(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def _at(name: str, index: int, value: int) -> Change:
    return lambda tensors: tensors[name].__setitem__(index, value)


def _repeat_column(tensors: dict[str, torch.Tensor]) -> None:
    crow, col = (tensors[f"{LAYER}.ortho.{part}"] for part in ("crow", "col"))
    start = int(crow[int((crow.diff() > 1).nonzero()[0])])
    col[start + 1] = col[start]


TENSOR_ERRORS: list[tuple[str, Change, str]] = [
    ("base", _put(f"{LAYER}.ortho.values", torch.ones(1)), "is an ortho tensor"),
    ("base", _put(f"{LAYER}.base.scale", torch.ones(24, 7)), "7 groups, which do not divide 40"),
    ("base", _put(f"{LAYER}.base.qdata", torch.ones(24, 40)), "qdata is F32: expected I8"),
    ("base", lambda t: t.pop(f"{LAYER}.base.scale"), "scale is missing"),
    ("ortho", lambda t: t.pop(f"{LAYER}.ortho.col"), "col is missing"),
    ("ortho", _put("stray", torch.ones(1)), "stray is unexpected"),
    ("ortho", _put(f"{LAYER}.ortho.crow", torch.zeros(25)), "crow is F32: expected I32"),
    ("ortho", _put(f"{LAYER}.ortho.crow", torch.zeros(9).int()), r"crow is \[9\]"),
    ("ortho", _put(f"{LAYER}.ortho.col", torch.zeros(2, 2).int()), r"col is \[2, 2\]"),
    ("ortho", _put(f"{LAYER}.ortho.values", torch.ones(3)), r"values is \[3\]"),
    ("ortho", _put(f"{LAYER}.ortho.values", torch.ones(48).int()), "values is I32"),
    ("ortho", _at(f"{LAYER}.ortho.col", 0, 40), r"holds 40: expected indices in \[0, 40\)"),
    ("ortho", _at(f"{LAYER}.ortho.col", 0, -1), "holds -1"),
    ("ortho", _at(f"{LAYER}.ortho.crow", 0, 1), "crow runs from 1"),
    ("ortho", _at(f"{LAYER}.ortho.crow", -1, 1000), "crow runs from 0 to 1000"),
    ("ortho", _at(f"{LAYER}.ortho.crow", 5, 2**31 - 1), "not monotone"),
    ("ortho", _at(f"{LAYER}.ortho.crow", 5, -(2**31)), "not monotone"),
    ("ortho", _repeat_column, "does not rise within a row"),
]


@pytest.mark.usefixtures("forbid_use")
@pytest.mark.parametrize(("file", "change", "match"), TENSOR_ERRORS)
def test_wrong_tensors(rewrite, file: str, change: Change, match: str, copy: Path) -> None:
    rewrite(copy, file, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_split(copy)
    assert ("model" if file == "base" else "ortho") + ".safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("left", torch.zeros(23, 3), r"left is \[23, 3\]: expected \[24, 3\]"),
        ("left", torch.zeros(24), r"left is \[24\]"),
        ("left", torch.zeros(24, 3).int(), "left is I32"),
        ("right", torch.zeros(2, 40).bfloat16(), r"right is \[2, 40\]: expected \[3, 40\]"),
        ("right", torch.zeros(3, 40), "right is F32: expected BF16"),
    ],
)
def test_wrong_factors(
    rewrite, part: str, tensor: torch.Tensor, match: str, saved_low_rank: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved_low_rank, tmp_path / "copy"))
    rewrite(folder, "ortho", _put(f"{LAYER}.ortho.{part}", tensor))
    with pytest.raises(CheckpointError, match=match):
        load_split(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing: the config's model has it"),
        (_put("stray", torch.ones(1)), "stray is unexpected: the config's model has no such"),
        (_put("lm_head.weight", torch.ones(24, 61)), r"is \[24, 61\], the config's model has"),
    ],
)
def test_tensors_that_the_model_does_not_have(rewrite, change: Change, match, copy: Path) -> None:
    rewrite(copy, "base", change)
    with pytest.raises(CheckpointError, match=match):
        load_split(copy)


@pytest.fixture
def int4_copy(split_model, tmp_path: Path) -> Path:
    base = BaseConfig(storage="int4", group_size=8)
    save_split(split_model(kind="sparse", base=base), tmp_path / "int4")
    return tmp_path / "int4"


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("qdata", torch.zeros(24, 40).byte(), r"qdata is \[24, 40\]: expected \[24, 20\]"),
        ("qdata", torch.zeros(24, 20).char(), "qdata is I8: expected U8"),
        ("scale", torch.ones(24, 5), "scale is F32: expected BF16"),
        ("scale", torch.ones(24, 7).bfloat16(), "7 groups, which do not divide 40 columns"),
        ("scale", torch.ones(120).bfloat16(), r"scale is \[120\]: expected \[24, 120\]"),
        ("zero", torch.zeros(24, 4).byte(), r"zero is \[24, 4\]: expected \[24, 5\]"),
        ("zero", torch.zeros(24, 5), "zero is F32: expected U8"),
        ("zero", None, "base.zero is missing"),
    ],
)
def test_wrong_int4_tensors(
    rewrite, part: str, tensor: torch.Tensor | None, match: str, int4_copy: Path, request
) -> None:
    request.getfixturevalue("forbid_use")
    name = f"{LAYER}.base.{part}"
    if tensor is None:
        rewrite(int4_copy, "base", lambda tensors: tensors.pop(name))
    else:
        rewrite(int4_copy, "base", _put(name, tensor))
    with pytest.raises(CheckpointError, match=match):
        load_split(int4_copy)


def test_int4_has_no_odd_width_and_int8_no_zero(edit, int4_copy: Path) -> None:
    before = (int4_copy / "config.json").read_text()
    edit(int4_copy, lambda m: m["layers"][LAYER].update(shape=[24, 41]))
    with pytest.raises(CheckpointError, match="41 columns: int4 packs two to a byte"):
        load_split(int4_copy)
    (int4_copy / "config.json").write_text(before)
    edit(int4_copy, lambda m: m["layers"][LAYER].update(base="int8"))
    with pytest.raises(CheckpointError, match=r"base\.zero does not belong .* int8 base"):
        load_split(int4_copy)
