"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import platformdirs


def cache_dir() -> Path:
    """Where this package keeps what it can make again: $LIBORTHO_CACHE, or the user's cache."""
    return Path(os.environ.get("LIBORTHO_CACHE") or platformdirs.user_cache_dir("libortho"))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` if the block ends well; makes the folder."""
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any, *, indent: int = 1) -> None:
    """Write JSON whole or not at all, making the folder; a file of that name is replaced."""
    with _replacing(path) as file:
        json.dump(data, file, indent=indent, ensure_ascii=False, allow_nan=True)
        file.write("\n")


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all, making the folder; a file of that name is replaced."""
    with _replacing(path) as file:
        file.write(text)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            yield file
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
