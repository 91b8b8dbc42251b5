"""Files that were truncated, changed or exchanged are found before a model is built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from libortho import CheckpointError
from libortho.checkpoint import load_split, save_split


def test_rewriting_alone_does_no_harm(rewrite, copy: Path) -> None:
    for file in ("base", "ortho"):
        rewrite(copy, file, lambda tensors: None)
    load_split(copy)


@pytest.mark.parametrize("file", ["base", "ortho"])
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files(file: str, keep: int, copy: Path) -> None:
    path = copy / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{file}\.safetensors: truncated"):
        load_split(copy)


@pytest.mark.parametrize("file", ["base", "ortho"])
def test_one_flipped_bit_is_found(file: str, copy: Path) -> None:
    path = copy / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file}\.safetensors.*sha256"):
        load_split(copy)


def test_the_ortho_file_of_another_split_is_refused(
    split_model, copy: Path, tmp_path: Path
) -> None:
    save_split(split_model(kind="sparse", seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other/ortho.safetensors", copy)
    with pytest.raises(CheckpointError, match=r"ortho\.safetensors: made for the base"):
        load_split(copy)
    shutil.copy(tmp_path / "other/base.safetensors", copy)
    with pytest.raises(CheckpointError, match=r"ortho\.safetensors|base\.safetensors"):
        load_split(copy)


def test_an_ortho_file_without_a_binding_is_refused(copy: Path) -> None:
    path = copy / "ortho.safetensors"
    save_file({name: t.clone() for name, t in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="made for the base"):
        load_split(copy)
