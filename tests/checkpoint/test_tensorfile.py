"""Reading one tensor: the bits that the safetensors library reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libortho.checkpoint.tensorfile import CHUNK, DTYPES, read_entries, read_tensor
from libortho.errors import CheckpointError


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 100
    tensors = {name: noise.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    tensors["large"] = torch.arange(CHUNK // 4 + 3)  # more than one chunk
    save_file(tensors, path)
    expected = load_file(path)
    entries = read_entries(path)
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        found = read_tensor(entry)
        assert (found.dtype, found.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(found, expected[name])


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"t": torch.ones(4)}, path)
    entry = read_entries(path)["t"]
    with pytest.raises(CheckpointError, match="dtype F8_E4M3: expected F64"):
        read_tensor(dataclasses.replace(entry, dtype="F8_E4M3"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="became shorter"):
        read_tensor(entry)
