"""Changed checkpoint files: an error of ours, or exactly the model that was saved."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import libortho
from libortho import CheckpointError, alpha_scope
from libortho.checkpoint import OrthoKey, encrypt_split, load_split, save_split, verify_split

pytest.importorskip("cryptography")
KEY = OrthoKey(bytes(range(32)))
IDS = torch.tensor([[1, 5, 9, 3]])
NUMBERS = (b"0", b"-1", b"4294967296", b"1e400", b"null", b"[]", b'"x"', b"{}", b"NaN")


@torch.no_grad()
def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    found = []
    for alpha in (0.0, 1.0):
        with alpha_scope(model, alpha):
            found.append(model(IDS).logits)
    return found


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of the things that disks, transfers and attackers do to a file."""
    at = rng.randrange(len(data))
    # Headers are where the structure is, so half of all changes go there.
    if rng.random() < 0.5:
        at = rng.randrange(min(len(data), 1500))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    if kind == 4:
        other = rng.randrange(len(data))
        return data[:at] + data[other : other + 16] + data[at + 16 :]
    if kind == 5:
        return data[:at] + b"\xff" * 8 + data[at + 8 :]
    digits = [i for i in range(min(len(data), 3000)) if data[i : i + 1].isdigit()]
    at = rng.choice(digits) if digits else at
    return data[:at] + rng.choice(NUMBERS) + data[at + 1 :]


@pytest.mark.parametrize("form", ["plain", "sealed"])
def test_mutated_files(
    tiny_llama, large_ortho, times: Callable[[str, int], int], form: str, tmp_path: Path
) -> None:
    model = libortho.replace_linear_layers(tiny_llama(num_hidden_layers=1))
    large_ortho(model)
    folder = tmp_path / "split"
    save_split(model, folder)
    if form == "sealed":
        encrypt_split(folder, KEY)
    files = [p for p in sorted(folder.iterdir()) if p.suffix != ".md"]
    contents = {path: path.read_bytes() for path in files}
    expected = outputs(load_split(folder, key=KEY))
    rng = random.Random(form)
    refused = loaded = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(times("FUZZ", 120) // 2):
        path = rng.choice(files)
        path.write_bytes(mutate(contents[path], rng))
        try:
            verify_split(folder, key=KEY)
            got = load_split(folder, key=KEY)
        except CheckpointError:
            refused += 1
        else:
            # A change that says nothing (white space, a report's number) is the same model.
            for mine, theirs in zip(outputs(got), expected, strict=True):
                assert torch.equal(mine, theirs), path.name
            loaded += 1
        finally:
            path.write_bytes(contents[path])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024, f"{grown} KiB more at the peak"
    print(f"\n{form}: {refused} refused, {loaded} loaded as they were saved")
    assert refused > loaded
    shutil.rmtree(folder)
