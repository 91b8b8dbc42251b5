"""Everything that can be wrong with a checkpoint's tensors, found before any model is built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from libortho.checkpoint.manifest import (
    BASE,
    MANIFEST,
    ORTHO,
    Manifest,
    PathLike,
    TensorEntry,
    blame,
    is_ortho_name,
    read_manifest,
)
from libortho.checkpoint.streams import check_base_layer, check_csr, check_ortho_layer, ortho_names
from libortho.errors import CheckpointError

DIGEST_KEY = "base_sha256"
"""Where the ortho file's metadata says which base it belongs to."""


def verify_split(folder: PathLike) -> Manifest:
    """Check a whole checkpoint, digests included; reads the files once, builds nothing.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_tensors(folder, manifest)
    check_digest(folder / BASE, manifest.base_sha256)
    if (folder / ORTHO).exists():
        assert manifest.ortho_sha256 is not None
        check_digest(folder / ORTHO, manifest.ortho_sha256)
    return manifest


def check_tensors(folder: Path, manifest: Manifest) -> None:
    """Compare both tensor files with the manifest: names, dtypes, shapes, binding, CSR indices."""
    _check_base(folder / BASE, manifest)
    if (folder / ORTHO).exists():
        _check_ortho(folder / ORTHO, manifest)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str) -> None:
    """Raise CheckpointError unless the file is, byte for byte, what the manifest speaks of."""
    found = sha256_of(path)
    if found != expected.lower():
        raise CheckpointError(
            f"{path}: sha256 is {found[:12]}..., {MANIFEST} says {expected[:12]}...: the file is "
            "damaged or belongs to another checkpoint"
        )


@contextmanager
def opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file, open for reading; CheckpointError where it is none."""
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error


def read_entries(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Every tensor's dtype and shape, and the metadata, from a safetensors header."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        entries = {
            name: TensorEntry(part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }
        return entries, dict(file.metadata() or {})


def refuse_ortho_tensors(path: Path) -> None:
    """Raise CheckpointError where a file that is to be without memory holds an ortho tensor."""
    for name in read_entries(path)[0]:
        if is_ortho_name(name):
            raise CheckpointError(f"{path}: {name} is an ortho tensor, which must not be here")


def _check_base(path: Path, manifest: Manifest) -> None:
    entries, _ = read_entries(path)
    refuse_ortho_tensors(path)
    with blame(path):
        _same_names(entries, manifest.tensors)
        for name, entry in manifest.tensors.items():
            if entries[name] != entry:
                raise ValueError(
                    f"{name} is {_show(entries[name])}, {MANIFEST} says {_show(entry)}"
                )
        for name, layer in manifest.layers.items():
            check_base_layer(name, layer, entries)


def _check_ortho(path: Path, manifest: Manifest) -> None:
    if manifest.ortho_sha256 is None:
        raise CheckpointError(f"{path}: {MANIFEST} knows of no ortho stream")
    entries, metadata = read_entries(path)
    with blame(path):
        if metadata.get(DIGEST_KEY) != manifest.base_sha256:
            raise ValueError(
                f"made for the base with sha256 {str(metadata.get(DIGEST_KEY))[:12]}..., this one "
                f"is {manifest.base_sha256[:12]}...: the two files are not of one split"
            )
        layers = manifest.layers.items()
        _same_names(entries, [n for k, x in layers for n in ortho_names(k, x).values()])
        for name, layer in layers:
            check_ortho_layer(name, layer, entries)
        with opened(path) as file:
            for name, layer in layers:
                if layer.ortho == "sparse":
                    crow, col = (file.get_tensor(f"{name}.ortho.{x}") for x in ("crow", "col"))
                    check_csr(name, crow, col, layer.shape[1])


def _same_names(found: Mapping[str, TensorEntry], expected: Iterable[str]) -> None:
    wanted = set(expected)
    for name in sorted(wanted - set(found)):
        raise ValueError(f"{name} is missing")
    for name in sorted(set(found) - wanted):
        raise ValueError(f"{name} is unexpected")


def _show(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"
