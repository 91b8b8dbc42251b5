"""Encrypt the ortho stream of a checkpoint that stands, or give an encrypted one another key.

Both write a new folder that takes the old one's place in one step, as every checkpoint is written.
Files that do not change are linked, not copied, so that the base costs nothing.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from libortho.checkpoint.atomic import replacing, sweep_beside
from libortho.checkpoint.keys import OrthoKey, current_access, ortho_access
from libortho.checkpoint.manifest import (
    Encryption,
    OrthoManifest,
    read_manifest,
    read_ortho_manifest,
)
from libortho.checkpoint.names import ORTHO, ORTHO_SEALED, PRIVATE, PathLike
from libortho.checkpoint.sealed import CIPHER, rewrap, seal
from libortho.checkpoint.verify import check_split, verify_split
from libortho.checkpoint.write import write_ortho_manifest, write_private
from libortho.errors import CheckpointError


def encrypt_split(folder: PathLike, key: OrthoKey) -> None:
    """Replace a checkpoint's plain `ortho.safetensors` by an encrypted one, all or nothing.

    What a file system or a disk keeps of a deleted file stays there: where that matters, save with
    a key in the first place (`save_split(..., key=key)`).

    Raises:
        CheckpointError: the checkpoint is damaged, has no ortho stream, one that is encrypted, or a
            link to one, whose file would stay as it is.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    # Also where it is encrypted already: killed at its end, an earlier call left the plain one.
    sweep_beside(folder)
    manifest, ortho = _read(folder)
    if ortho.encryption is not None:
        raise CheckpointError(
            f"{folder}: the ortho stream is encrypted already, with the key "
            f"{ortho.encryption.key_id}; `libortho rotate-key` changes that"
        )
    plain = folder / ORTHO
    if plain.is_symlink():  # so it is in huggingface_hub's cache
        raise CheckpointError(
            f"{plain}: a link to {os.path.realpath(plain)}, which would stay in plain: expected "
            "the file itself; copy the folder with what it links to (cp -rL), encrypt the copy "
            "and delete the original"
        )
    verify_split(folder)
    with _replacing_ortho(folder) as partial:
        content = (folder / ORTHO).read_bytes()
        write_private(partial / ORTHO_SEALED, seal(content, key, manifest))
        _name_key(partial, ortho, key)
        with ortho_access(key):
            check_split(partial)


def rotate_key(folder: PathLike, new: OrthoKey, *, old: OrthoKey | None = None) -> None:
    """Give an encrypted ortho stream another key, all or nothing; the old one opens it no more.

    The stream itself stays as it was encrypted, under a key of its own, and only what wraps that
    one is made anew. So whoever has an old copy of the file and the old key still reads it, and
    whoever kept the stream's own key reads the new file too: after a leak, save the split anew.

    Args:
        folder: of the checkpoint.
        new: that is to open it.
        old: that opens it now; by default the one in use (see `load_split`).

    Raises:
        CheckpointError: the checkpoint is damaged, not encrypted, or with another key than `old`.
        OrthoLocked: there is no old key.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    _, ortho = _read(folder)
    if ortho.encryption is None:
        raise CheckpointError(f"{folder}: the ortho stream is not encrypted: `libortho encrypt` it")
    with ortho_access(old):
        check_split(folder)
        header = rewrap(folder / ORTHO_SEALED, current_access().find_key(), new)
    with _replacing_ortho(folder) as partial:
        sealed = (folder / ORTHO_SEALED).read_bytes()
        write_private(partial / ORTHO_SEALED, header + sealed[len(header) :])
        _name_key(partial, ortho, new)
        with ortho_access(new):
            check_split(partial)


def _read(folder: Path) -> tuple[str, OrthoManifest]:
    """The base's digest and what is said of the ortho stream."""
    manifest = read_manifest(folder)
    ortho = read_ortho_manifest(folder, manifest)
    if ortho is None:
        raise CheckpointError(f"{folder} has no ortho stream: a base-only deployment has no secret")
    return manifest.base_sha256, ortho


def _name_key(partial: Path, ortho: OrthoManifest, key: OrthoKey) -> None:
    encryption = Encryption(CIPHER, key.id)
    write_ortho_manifest(partial, dataclasses.replace(ortho, encryption=encryption))


@contextmanager
def _replacing_ortho(folder: Path) -> Iterator[Path]:
    """A folder that will take the place of `folder`, with all of its files but the ortho's."""
    folder = Path(os.path.realpath(folder))
    with replacing(folder) as partial:
        shutil.copytree(
            folder,
            partial,
            ignore=lambda place, names: set(PRIVATE) & set(names) if place == str(folder) else (),
            copy_function=_link,
            symlinks=True,
            dirs_exist_ok=True,
        )
        yield partial


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
