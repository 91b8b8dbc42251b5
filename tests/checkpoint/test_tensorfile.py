"""Reading one tensor: the bits that the safetensors library reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libortho.checkpoint.tensorfile import (
    ALIGNMENT,
    CHUNK,
    DTYPES,
    read_entries,
    read_tensor,
    save_aligned,
)
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
    with pytest.raises(CheckpointError, match="dtype F8_E4M3: expected I64"):
        read_tensor(dataclasses.replace(entry, dtype="F8_E4M3"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="became shorter"):
        read_tensor(entry)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_data_begins_at_a_whole_line(tmp_path: Path, count: int) -> None:
    path = tmp_path / "t.safetensors"
    sizes = torch.randint(1, 200, (count,), generator=torch.Generator().manual_seed(count))
    tensors = {
        f"läyer.{i}{'.long' * (i % 5)}.{dtype}": torch.zeros(64 * int(size), dtype=torch_dtype)
        for i, size in enumerate(sizes)
        for dtype, torch_dtype in DTYPES.items()
    }
    save_aligned(tensors, path)
    assert all(entry.start % ALIGNMENT == 0 for entry in read_entries(path).values())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_of_later_days_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(64), "b": torch.ones(64).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"b is torch.float8_e4m3fn: expected I64, F64"):
        save_aligned(tensors, tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6).reshape(2, 3).T, "a": torch.tensor(2.5), "c": torch.ones(0, 3)}
    save_aligned(tensors, tmp_path / "one")
    save_aligned(dict(reversed(tensors.items())), tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    found = load_file(tmp_path / "one")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
