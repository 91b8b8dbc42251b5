"""Is any of these tensors' bytes in those files? The proof behind `strip`.

Each tensor is cut into blocks of `BLOCK` bytes, and every file is looked through at *every* offset
for any of them: at which place, in which order or how much of a tensor is there makes no
difference. Only the stored bytes are sought; the same numbers in another dtype look otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from libortho.checkpoint.tensorfile import TensorEntry, read_bytes

BLOCK = 32
"""Bytes: 16 numbers in half precision. That many equal ones by chance do not happen."""
TELLING = 8
"""Different bytes in a block, at least, for its being found to tell anything; zeros abound."""
CHUNK = 16 * 2**20
"""Bytes of a file looked through at a time."""
_WORD = 8
_TABLE_BITS = 22
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Searched:
    """What was looked for, and where.

    Attributes:
        tensors: number of tensors sought.
        blocks: their blocks that were sought.
        silent: tensors of which no block tells anything (empty, or of few different bytes), which
            were therefore not sought.
        files: of the files that were looked through, relative paths.
        nbytes: of these files.
    """

    tensors: int
    blocks: int
    silent: tuple[str, ...]
    files: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Found:
    """One block that is where it must not be."""

    tensor: str
    file: str
    offset: int


def search(
    tensors: Mapping[str, TensorEntry], folder: Path, files: Sequence[str]
) -> Searched | Found:
    """Look for the bytes of `tensors` in `files`; the first that is found, or what was searched.

    Args:
        tensors: name -> where its bytes are.
        folder, files: relative paths in a folder, to be looked through whole.
    """
    owners: dict[bytes, str] = {}
    silent = []
    for name, entry in tensors.items():
        own = _telling_blocks(bytes(read_bytes(entry)))
        owners |= dict.fromkeys(own, name)
        if not own:
            silent.append(name)
    nbytes = sum((folder / file).stat().st_size for file in files)
    searched = Searched(
        len(tensors) - len(silent), len(owners), tuple(silent), tuple(files), nbytes
    )
    if not owners:
        return searched
    sought = _Blocks(owners)
    for file in files:
        with (folder / file).open("rb") as stream:
            tail, start = b"", 0
            while data := stream.read(CHUNK):
                window = tail + data
                place = sought.find(window)
                if place is not None:
                    block = window[place : place + BLOCK]
                    return Found(owners[block], file, start - len(tail) + place)
                start += len(data)
                tail = window[-(BLOCK - 1) :]
    return searched


def _telling_blocks(data: bytes) -> list[bytes]:
    starts = list(range(0, len(data) - BLOCK + 1, BLOCK))
    if len(data) % BLOCK and len(data) > BLOCK:
        starts.append(len(data) - BLOCK)
    blocks = (data[start : start + BLOCK] for start in starts)
    return [block for block in blocks if len(set(block)) >= TELLING]


class _Blocks:
    """Finds the first place of any of some blocks of bytes.

    A block begins with a word of eight bytes. The words at all eight alignments are looked up in a
    table of hashes first, and what few pass are compared in full.
    """

    def __init__(self, blocks: Mapping[bytes, object]) -> None:
        self._blocks = blocks
        words = np.frombuffer(b"".join(block[:_WORD] for block in blocks), dtype="<u8")
        # Of many blocks, a table of this size would be full and let everything pass.
        bits = max(_TABLE_BITS, (16 * len(words)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, dtype=bool)
        self._table[self._hash(words)] = True

    def find(self, window: bytes) -> int | None:
        """The first offset in `window` at which a block stands, or None."""
        found = []
        for shift in range(_WORD):
            count = (len(window) - shift) // _WORD
            if count < 1:
                continue
            words = np.frombuffer(window, dtype="<u8", offset=shift, count=count)
            for index in np.flatnonzero(self._table[self._hash(words)]):
                place = int(index) * _WORD + shift
                if window[place : place + BLOCK] in self._blocks:
                    found.append(place)
                    break
        return min(found, default=None)

    def _hash(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (words * _MIX) >> self._shift
