"""Everything that can be wrong with a checkpoint's files, found before any tensor is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from libortho.checkpoint.keys import OrthoKey, current_access, ortho_access
from libortho.checkpoint.manifest import (
    Manifest,
    OrthoManifest,
    check_config,
    is_ortho_name,
    read_manifest,
    read_ortho_manifest,
)
from libortho.checkpoint.names import (
    CONFIG,
    ORTHO_CONFIG,
    PRIVATE,
    PathLike,
    base_files,
    ortho_file,
)
from libortho.checkpoint.schema import blame
from libortho.checkpoint.sealed import unseal
from libortho.checkpoint.streams import (
    check_base_layer,
    check_csr,
    check_ortho_layer,
    ortho_names,
    streams_of,
)
from libortho.checkpoint.tensorfile import TensorEntry, digest, read_entries, read_tensor
from libortho.errors import CheckpointError

Stamp = tuple[int, int, int, int]
"""Device, inode, bytes and time of the last change of a file."""


@dataclass(frozen=True)
class Verified:
    """A checkpoint whose files were found to be of one piece.

    Attributes:
        folder: where it is.
        manifest: of its base.
        ortho: of its ortho stream, None in a base-only deployment, or where it was left alone.
        base_tensors, ortho_tensors: name -> what is stored of that name.
        locked: there is an ortho stream, and it was left alone (`load_split(base_only=True)`).
        stamps: file -> what tells it from another of its name; from before it was read.
    """

    folder: Path
    manifest: Manifest
    ortho: OrthoManifest | None
    base_tensors: dict[str, TensorEntry]
    ortho_tensors: dict[str, TensorEntry]
    locked: bool = False
    stamps: dict[Path, Stamp | None] = field(default_factory=dict)

    @property
    def sealed(self) -> bool:
        """The ortho stream is encrypted on the disk; its content is in `ortho_tensors`."""
        return self.ortho is not None and self.ortho.encryption is not None


def verify_split(folder: PathLike, *, key: OrthoKey | None = None) -> Verified:
    """Check a whole checkpoint, every byte of every tensor; builds nothing.

    Loading does the same but for the tensors of layers that are not split, which it would have to
    read twice. What only the model's class can tell, that these are the tensors that it needs, is
    checked when it is loaded.

    Args:
        folder: of the checkpoint.
        key: as of `load_split`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        OrthoLocked: the ortho stream is encrypted, and there is no key.
    """
    with ortho_access(key):
        found = check_split(folder)
    says = found.folder / CONFIG
    check_digest(says, "base", found.manifest.base_sha256, found.base_tensors)
    check_config(found.folder, found.manifest)
    return found


def check_split(folder: PathLike) -> Verified:
    """What is checked whenever a checkpoint is loaded: all but the digest of the whole base."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    stamps = {path: _stamp(path) for path in _tensor_files(folder)}
    found = replace(check_files(folder, manifest), stamps=stamps)
    streams = streams_of(found.manifest.layers, found.base_tensors)
    check_digest(folder / CONFIG, "base", found.manifest.streams_sha256, streams)
    if found.ortho is not None:
        check_digest(folder / ORTHO_CONFIG, "ortho", found.ortho.ortho_sha256, found.ortho_tensors)
    return found


def check_unchanged(found: Verified) -> None:
    """Raise CheckpointError unless the files of a checkpoint are still those that were checked.

    For who reads them a second time: `save_split` may have put another checkpoint in their place.
    """
    for path, stamp in found.stamps.items():
        if _stamp(path) != stamp:
            raise CheckpointError(
                f"{path}: another file than when it was checked: the checkpoint was replaced or "
                "changed while it was loaded; load it again"
            )


def _tensor_files(folder: Path) -> list[Path]:
    ortho = None if current_access().base_only else ortho_file(folder)
    return [*base_files(folder), *([] if ortho is None else [ortho])]


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_files(folder: Path, manifest: Manifest) -> Verified:
    """Names, dtypes, shapes, the binding of ortho to base, and CSR indices; no digests.

    An encrypted ortho stream is opened, with the key that holds here (`keys.current_access`).
    """
    base = read_base(folder)
    for name, layer in manifest.layers.items():
        with blame(_file_of(name, base, folder)):
            check_base_layer(name, layer, base)
    for name, source in manifest.tied.items():
        if source not in base or name in base:
            raise CheckpointError(
                f"{folder / CONFIG}: tied.{name}={source!r}: expected the name of a stored tensor"
            )
    access = current_access()
    if access.base_only:
        # Half an ortho stream, or two of them, is no reason not to have the base.
        there = any((folder / name).exists() for name in PRIVATE)
        return Verified(folder, manifest, None, base, {}, locked=there)
    path = ortho_file(folder)
    if path is None:
        return Verified(folder, manifest, None, base, {})
    ortho = read_ortho_manifest(folder, manifest)
    assert ortho is not None  # as there is a file
    content = None
    if ortho.encryption is not None:
        with blame(path):
            key = access.find_key()
        content = unseal(path, key, manifest.base_sha256)
    entries = _check_ortho(path, content, manifest, ortho)
    return Verified(folder, manifest, ortho, base, entries)


def read_base(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of all files of a base, by name.

    Raises:
        CheckpointError: a name is in two files, or is that of an ortho tensor.
    """
    entries: dict[str, TensorEntry] = {}
    for path in base_files(folder):
        for name, entry in read_entries(path).items():
            if is_ortho_name(name):
                raise CheckpointError(f"{path}: {name} is an ortho tensor, which must not be here")
            if name in entries:
                raise CheckpointError(f"{path}: {name} is in {entries[name].file.name} already")
            entries[name] = entry
    return entries


def check_digest(says: Path, which: str, expected: str, entries: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError unless tensors are, bit for bit, what the manifest `says` speaks of."""
    found = digest(entries)
    if found != expected:
        files = ", ".join(sorted({entry.file.name for entry in entries.values()}))
        raise CheckpointError(
            f"{says.parent}: the sha256 of the tensors in {files} is {found[:12]}..., {says.name} "
            f"says {expected[:12]}...: the {which} is damaged or belongs to another checkpoint"
        )


def _file_of(layer: str, entries: Mapping[str, TensorEntry], folder: Path) -> Path:
    files = (entry.file for name, entry in entries.items() if name.startswith(f"{layer}."))
    return next(files, folder / CONFIG)


def _check_ortho(
    path: Path, content: bytes | None, manifest: Manifest, ortho: OrthoManifest
) -> dict[str, TensorEntry]:
    entries = read_entries(path, content)
    with blame(path):
        layers = ortho.layers.items()
        _same_names(entries, [n for name, kind in layers for n in ortho_names(name, kind).values()])
        for name, kind in layers:
            check_ortho_layer(name, manifest.layers[name], kind, entries)
        for name, kind in layers:
            if kind == "sparse":
                crow, col = (read_tensor(entries[f"{name}.ortho.{x}"]) for x in ("crow", "col"))
                check_csr(name, crow, col, manifest.layers[name].shape[1])
    return entries


def _same_names(found: Iterable[str], expected: Iterable[str]) -> None:
    wanted, there = set(expected), set(found)
    for name in sorted(wanted - there):
        raise ValueError(f"{name} is missing")
    for name in sorted(there - wanted):
        raise ValueError(f"{name} is unexpected")
