"""How often a fault is tried, processes that are killed, and where ortho tensors lie on disk."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BLOCK = 32
"""Bytes of an ortho tensor that are sought together; by chance they are nowhere."""
MOST_BLOCKS = 32
"""Of each tensor, about."""


@pytest.fixture(scope="session")
def times() -> Callable[[str, int], int]:
    """`times("FUZZ", 200)`: what LIBORTHO_FUZZ says, or 200."""
    return lambda name, few: int(os.environ.get(f"LIBORTHO_{name}", few))


class Killer:
    """Runs a function in a fork and kills that at a random instant.

    A fork has the models and all imports, so that a kill costs what was done until then.

    Attributes:
        kills, ends: how many were killed, and how many came to their end before.
    """

    def __init__(self, seed: int = 0) -> None:
        self._fork = multiprocessing.get_context("fork")
        self._draw = random.Random(seed)
        self.kills = self.ends = 0

    def _start(self, work: Callable[[], Any]) -> multiprocessing.process.BaseProcess:
        def child() -> None:
            # PyTorch makes the thread pool that a fork lacks at its first use, and not safely where
            # several threads come first, as those that load a model do: "Invalid thread pool!".
            torch.set_num_threads(torch.get_num_threads())
            work()

        process = self._fork.Process(target=child)
        process.start()
        return process

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long `work` takes, to its end."""
        start = time.perf_counter()
        process = self._start(work)
        process.join()
        assert process.exitcode == 0
        return time.perf_counter() - start

    def kill(self, work: Callable[[], Any], within: float) -> bool:
        """True where `work` was killed, at a random instant of the first `within` seconds."""
        process = self._start(work)
        process.join(self._draw.uniform(0, within))
        assert process.pid is not None
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            self.kills += 1
            return True
        assert process.exitcode == 0
        self.ends += 1
        return False


@pytest.fixture
def killer() -> Killer:
    """A `Killer` of one's own."""
    return Killer()


def tensor_bytes(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Each tensor as it would lie in a file."""
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def holding(contents: dict[Path, bytes], tensors: dict[str, bytes]) -> set[Path]:
    """The files in which 32 bytes of a tensor lie anywhere; in texts also as hex or base64.

    Of each tensor so many blocks are looked for, from its start to its end, that no file that holds
    a part worth the name could be missed.
    """
    import base64

    raw: set[bytes] = set()
    written: set[bytes] = set()
    for data in tensors.values():
        step = max(1, len(data) // BLOCK // MOST_BLOCKS) * BLOCK
        for start in range(0, len(data) - BLOCK + 1, step):
            block = data[start : start + BLOCK]
            if len(set(block)) > 8:  # zeros are everywhere
                raw.add(block)
                written.add(block.hex().encode())
                # At any of three places a block of base64 may begin.
                written |= {base64.b64encode(block[i : i + 24]) for i in range(3)}
    assert raw
    return {
        path
        for path, data in contents.items()
        if any(block in data for block in raw)
        or (data.isascii() and any(block in data for block in written))
    }


def contents_of(*folders: Path) -> dict[Path, bytes]:
    """Every file below, hidden ones too."""
    return {p: p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def ortho_blocks() -> Callable[..., set[Path]]:
    """`ortho_blocks(model, contents)`: which of {path: bytes} hold bytes of the model's ortho."""

    def find(model: Any, contents: dict[Path, bytes]) -> set[Path]:
        # Not indices: a run of small numbers may well be elsewhere.
        held = model.state_dict().items()
        tensors = {n: t for n, t in held if ".ortho." in n and t.is_floating_point()}
        return holding(contents, tensor_bytes(tensors))

    return find


@pytest.fixture(scope="session")
def ortho_holders(ortho_blocks) -> Callable[..., set[str]]:
    """`ortho_holders(model, *folders)`: names of the files below that hold bytes of its ortho."""

    def find(model: Any, *folders: Path) -> set[str]:
        return {path.name for path in ortho_blocks(model, contents_of(*folders))}

    return find
