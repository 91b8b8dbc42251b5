"""The names of a split checkpoint's files, and which of them a base-only deployment is made of."""

from __future__ import annotations

import os
import re
from pathlib import Path

from libortho.checkpoint.tensorfile import shards_of
from libortho.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
BASE = "model.safetensors"
BASE_INDEX = "model.safetensors.index.json"
BASE_PATTERN = "model{suffix}.safetensors"
ORTHO = "ortho.safetensors"
ORTHO_SEALED = "ortho.safetensors.enc"
ORTHO_CONFIG = "ortho_config.json"
REPORT = "report.json"
CARD = "README.md"

OUTDATED = "libortho.json"
"""What a folder of the format before version 1 has, and no other."""

PRIVATE = (ORTHO, ORTHO_SEALED, ORTHO_CONFIG)
"""Readable by their owner alone, and never part of a base-only deployment."""

_TOKENIZER = (
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|(spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja"
)

PathLike = str | os.PathLike[str]


def base_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's base, as transformers would find them.

    Raises:
        CheckpointError: there are none, one that the index names is missing, or there are both
            one file and an index (a reader of either would miss the other).
    """
    single, index = folder / BASE, folder / BASE_INDEX
    if single.is_file() and index.exists():
        raise CheckpointError(f"{folder} holds {BASE} and {BASE_INDEX}: expected one of them")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{single} is missing: not a whole split checkpoint")
    files = [folder / name for name in shards_of(index)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {BASE_INDEX} names it")
    return files


def ortho_file(folder: Path) -> Path | None:
    """Where a folder's ortho stream is, plain or encrypted; None in a base-only deployment.

    Raises:
        CheckpointError: there are both, or one of `ortho_config.json` and the tensors alone.
    """
    found = [folder / name for name in (ORTHO, ORTHO_SEALED) if (folder / name).exists()]
    config = folder / ORTHO_CONFIG
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds {ORTHO} and {ORTHO_SEALED}: expected one of them")
    if not found and not config.exists():
        return None
    missing = [path for path in (config, *(found or [folder / ORTHO])) if not path.is_file()]
    if missing:
        other = found[0].name if found and missing == [config] else ORTHO_CONFIG
        raise CheckpointError(f"{missing[0]} is missing, and {other} is there: half an ortho")
    return found[0]


def public_files(folder: Path) -> list[str]:
    """What a base-only deployment of a checkpoint consists of, relative paths, sorted.

    A list of what may come along, not of what may not: a file that this format does not know (a
    spare ortho file, say) stays behind.
    """
    known = {CONFIG, GENERATION_CONFIG, BASE_INDEX, REPORT, CARD}
    known |= {file.name for file in base_files(folder)}
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name in known or re.fullmatch(_TOKENIZER, name))
