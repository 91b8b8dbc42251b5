"""strip: a checkpoint without its ortho stream, and the proof that it is without it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from libortho.checkpoint.atomic import replacing
from libortho.checkpoint.keys import OrthoKey
from libortho.checkpoint.names import CONFIG, PRIVATE, PathLike, public_files
from libortho.checkpoint.search import Found, Searched, search
from libortho.checkpoint.verify import check_digest, read_base, verify_split
from libortho.errors import CheckpointError


def strip(folder: PathLike, out: PathLike, *, key: OrthoKey | None = None) -> Searched:
    """Copy a split checkpoint without its ortho stream: a deployment that holds no memory.

    Only files that the format knows are copied (config, base, card, report, tokenizer), so that
    nothing that was put beside them (a spare ortho file, say) comes along. Every byte of the copy
    is then searched for the bytes of every ortho tensor. All or nothing, as `save_split`.

    Args:
        folder: a split checkpoint, with or without its ortho files; verified first.
        out: as `folder` of `save_split`, and neither inside of the other.
        key: as of `load_split`; an encrypted ortho stream is opened, to know what to look for.

    Returns:
        What was searched for and where. No tensor is sought where `folder` has no ortho stream.

    Raises:
        ValueError: `out` is `folder`, or holds it.
        CheckpointError: the checkpoint is damaged, or bytes of the ortho stream would be in the
            copy.
        OrthoLocked: the ortho stream is encrypted, and there is no key.
        FileExistsError, OSError: as `save_split`.
    """
    folder, out = Path(folder), Path(out)
    source, target = Path(os.path.realpath(folder)), Path(os.path.realpath(out))
    if source == target or target in source.parents or source in target.parents:
        raise ValueError(
            f"out={str(out)!r} would replace or lie in {folder}, which holds the ortho stream: "
            "expected a folder apart from it"
        )
    found = verify_split(folder, key=key)
    files = public_files(folder)
    with replacing(out) as partial:
        for name in files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        # What was verified is the source; the rest looks at the copy itself.
        check_digest(partial / CONFIG, "base", found.manifest.base_sha256, read_base(partial))
        there = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
        for name in there:
            if Path(name).name in PRIVATE:
                raise CheckpointError(f"{name} is of the ortho stream, which must not be here")
        result = search(found.ortho_tensors, partial, there)
        if isinstance(result, Found):
            raise CheckpointError(
                f"{folder / result.file}: holds bytes of {result.tensor} at offset "
                f"{result.offset}, which must not be in a base-only deployment; nothing was written"
            )
    return result
