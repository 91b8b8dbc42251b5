"""Files that are whole or not there, whatever kills the process that writes them.

What is not finished lies beside its place as `<prefix><12 hexadecimal digits>`, open to its owner
alone, and its process holds a lock on it. The kernel lifts the lock when the process ends, however
it ends; so whoever writes to that place next knows what was abandoned, and removes it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def cache_dir() -> Path:
    """Where this package keeps what it can make again: $LIBORTHO_CACHE, or the user's cache."""
    return Path(os.environ.get("LIBORTHO_CACHE") or platformdirs.user_cache_dir("libortho"))


# -- unfinished files --------------------------------------------------------------


@contextmanager
def scratch(
    place: Path, prefix: str, *, folder: bool = False, mode: int | None = None
) -> Iterator[Path]:
    """Yield a new empty file (or folder) in `place`; if it is still there at the end, it goes.

    Its mode is `mode` less the umask; by default it is its owner's alone.

    First removes what processes that are no more left there under `prefix`. Without locks (on
    Windows, on some network file systems) nothing of the kind is removed.
    """
    sweep(place, prefix)
    handle = None
    while handle is None:
        path = place / f"{prefix}{secrets.token_hex(6)}"
        if folder:
            path.mkdir(mode=mode or 0o700)
        else:
            path.touch(mode=mode or 0o600, exist_ok=False)
        try:
            handle = claim(path)  # None: swept away by another before it was claimed
        except OSError:
            break
    try:
        yield path
    finally:
        remove(path)
        if handle is not None:
            os.close(handle)


def claim(path: Path) -> int | None:
    """Mark a file or folder as in use, until the handle is closed or this process ends.

    Returns:
        The handle; None where another has it, or it is not there.

    Raises:
        OSError: there are no such locks here, or it is not this user's.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no locks on this system")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    ours = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(handle), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if not ours:
            os.close(handle)
    return handle if ours else None


def sweep(place: Path, prefix: str) -> None:
    """Remove what `scratch` made in `place` under `prefix` and no living process holds."""
    made = re.compile(re.escape(prefix) + "[0-9a-f]{12}")
    if not place.is_dir():
        return
    for path in sorted(place.iterdir()):
        if not made.fullmatch(path.name):
            continue
        try:
            handle = claim(path)
        except OSError:
            continue
        if handle is not None:
            remove(path)
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No two such blocks of one folder run at once, in whatever processes: the second one waits.

    For who reads a file and writes it anew. The lock is on the folder, since a file that is
    replaced takes its lock along. Without locks (on Windows, on some network file systems) nobody
    waits.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_makeable(path: Path) -> None:
    """Raise now what making a file or folder, and the folders above it, would raise later.

    Raises:
        NotADirectoryError, PermissionError: it could not be made where it is to be.
    """
    parent = next(above for above in Path(os.path.realpath(path)).parents if above.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file: {path} cannot be made in it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{parent} is not writable: {path} cannot be made in it")


# -- whole files -------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` if the block ends well; makes the folder.

    With `folder` that is an empty folder; `path` must not be there, or be an empty folder, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch(path.parent, unfinished(path), folder=folder) as partial:
        yield partial
        os.replace(partial, path)


def unfinished(path: Path) -> str:
    """The prefix of what is to become `path`."""
    return f".{path.name}.partial-"


def write_json(path: Path, data: Any, *, indent: int = 1) -> None:
    """Write `json_text` whole or not at all, making the folder; a file of that name is replaced."""
    write_text(path, json_text(data, indent=indent))


def json_text(data: Any, *, indent: int = 1) -> str:
    """JSON with a newline at its end; numbers that RFC 8259 lacks, NaN and Inf, become null."""
    finite = _without_nonfinite(data)
    return json.dumps(finite, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all, making the folder; a file of that name is replaced."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def rewrite_text(path: Path, text: str) -> None:
    """As `write_text`, but a file that is there keeps its mode and, as far as may be, its owner.

    A symlink stays one: the file that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        if path.exists():
            _give_owner(partial, path.stat())
            shutil.copymode(path, partial)


def _give_owner(path: Path, like: os.stat_result) -> None:
    """Owner and group of another file; the group alone where only that is allowed."""
    if not hasattr(os, "chown"):  # Windows
        return
    for user in (like.st_uid, -1):
        with suppress(PermissionError):
            os.chown(path, user, like.st_gid)
            return
