"""safetensors files: what is in them, and where each tensor's bytes lie.

The safetensors library checks a file and hands out tensors; digests, the search of `strip` and the
split of a model larger than memory need the bytes themselves. A file is eight bytes (the header's
length, little-endian), a JSON header with each tensor's dtype, shape and offsets, and the data that
the offsets count from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize, safe_open
from torch import Tensor

from libortho.errors import CheckpointError

CHUNK = 2**20
"""Bytes read at a time: digests take no more memory than this a thread."""
THREADS = min(4, os.cpu_count() or 1)

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that a checkpoint may hold, in the order that it writes."""

METADATA = {"format": "pt"}
"""What transformers looks for."""

ALIGNMENT = 64
"""Bytes: a cache line, and the widest register of a CPU. The data of a file begins at a multiple. A
file is mapped as it lies, and where its header ends decides whether a row of a weight is read in
whole lines."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        file: that it is in.
        dtype: as safetensors names it ("F32", "BF16", "I8", "U8").
        shape: its dimensions.
        start, stop: where its bytes lie in the file.
        content: of an encrypted file, or of a tensor in memory, the content in which they lie; in
            no repr.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    content: bytes | memoryview | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, open for reading; CheckpointError where it is none."""
    try:
        with safe_open(str(path), framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error


def read_entries(path: Path, content: bytes | None = None) -> dict[str, TensorEntry]:
    """Every tensor of a file by name.

    Args:
        path: the file.
        content: what it holds, where that is not what is on the disk (an encrypted file).

    Raises:
        CheckpointError: the file is truncated or not a safetensors file.
    """
    # The header is read once the library has checked it. For torch the library maps the whole file
    # as private data, which a limit on memory counts.
    if content is None:
        with opened(path, "numpy"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    else:
        try:
            deserialize(content)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: holds no safetensors file ({error})") from error
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    entries = {}
    for name, part in header.items():
        start, stop = (8 + length + offset for offset in part["data_offsets"])
        shape = tuple(part["shape"])
        entries[name] = TensorEntry(path, part["dtype"], shape, start, stop, content)
    return entries


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Tensors in memory as `read_entries` would give them once they are saved; copies none on CPU.

    Args:
        tensors: by name, of dtypes in `DTYPES`.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        shape = tuple(tensor.shape)
        entries[name] = TensorEntry(
            Path(), names[tensor.dtype], shape, 0, flat.numel(), flat.numpy().data
        )
    return entries


def save_aligned(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, for its owner only, whose data begins at a multiple of `ALIGNMENT`.

    Tensors whose sizes are multiples, which weights' are, are then all aligned. The same tensors
    give the same bytes. (The library pads a header to eight bytes only.)

    Args:
        tensors: by name, on the CPU.
        path: the file.

    Raises:
        OSError: it cannot be written.
        ValueError: a dtype that is not in `DTYPES`.
    """
    places = {dtype: (place, name) for place, (name, dtype) in enumerate(DTYPES.items())}
    for name, tensor in tensors.items():
        if tensor.dtype not in places:
            raise ValueError(f"{name} is {tensor.dtype}: expected {', '.join(DTYPES)}")
    # The library's own order: the largest elements first, so that each is aligned to its size.
    names = sorted(tensors, key=lambda name: (places[tensors[name].dtype][0], name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": places[tensors[name].dtype][1],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    # Closed to others from the first byte, as the library's own files are.
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of one tensor, some at a time; each view holds until the next is asked for.

    Raises:
        CheckpointError: the file has become shorter since its header was read.
    """
    if entry.content is not None:
        yield memoryview(entry.content)[entry.start : entry.stop]
        return
    # One buffer for all: a new one each time costs more, in page faults, than the hash.
    left = entry.stop - entry.start
    buffer = memoryview(bytearray(min(left, CHUNK)))
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while left:
            count = file.readinto(buffer[: min(left, CHUNK)])
            if not count:
                raise CheckpointError(f"{entry.file}: became shorter while it was read")
            left -= count
            yield buffer[:count]


def read_bytes(entry: TensorEntry) -> bytearray:
    """The bytes of one tensor, whole; raises as `chunks`."""
    data = bytearray()
    for part in chunks(entry):  # not join, which would hold every view of the one buffer
        data += part
    return data


def read_tensor(entry: TensorEntry) -> Tensor:
    """A tensor of a file, in memory of its own, on the CPU: nothing else of the file is read.

    Raises:
        CheckpointError: a dtype that this package does not know, or as `chunks`.
    """
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.file}: dtype {entry.dtype}: expected {', '.join(DTYPES)}")
    data = read_bytes(entry)
    dtype = DTYPES[entry.dtype]
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape)


def digest(entries: Mapping[str, TensorEntry]) -> str:
    """One SHA-256 for a set of tensors, however they are spread over files.

    It is taken of one line a tensor, sorted by name: name, dtype, dimensions with "x" between them,
    and the SHA-256 of its bytes, with a tab between each two and a newline at the end. So neither
    the number of shards nor a file's layout changes it, and any bit of any tensor does.
    """
    names = sorted(entries)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _sha256(chunks(entries[name])), names))
    lines = (
        "\t".join((name, entries[name].dtype, "x".join(map(str, entries[name].shape)), own)) + "\n"
        for name, own in zip(names, found, strict=True)
    )
    return _sha256(line.encode() for line in lines)


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def shards_of(index: Path) -> Sequence[str]:
    """The file names that a `model.safetensors.index.json` speaks of, sorted.

    Raises:
        CheckpointError: it is no such index, or names a file outside of its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index}: names the file {name!r}, expected one in its folder")
    if not names:
        raise CheckpointError(f"{index}: names no file")
    return names
