"""Write a folder all or nothing: beside its place first, synced to disk, then renamed into it."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from libortho.checkpoint.manifest import is_split
from libortho.checkpoint.names import PathLike
from libortho.files import check_makeable, scratch, sweep


@contextmanager
def replacing(folder: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to write into; it takes the place of `folder` when the block ends well.

    It is `partial` where that is given, on the disk of `folder`, else it has a name of its own
    beside `folder`. What a killed process left there is removed first (see `sweep_beside`).

    A split checkpoint that stands there is replaced as a whole, with everything in it but its
    permissions. If anything raises, it is back in its place and nothing of the new one remains. On
    Linux the two change places in one step, so that there is one of them at every instant.
    Elsewhere, and on file systems that cannot, a process killed between two renames leaves the old
    checkpoint beside its place, named `.<name>.old-<random>`, and none in it.

    Raises:
        FileExistsError: `folder` is a mount point, or exists, is not empty, and is no split
            checkpoint.
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_beside(target)
    place: AbstractContextManager[Path]
    if partial is None:
        place = scratch(target.parent, _prefix(target, "partial"), folder=True, mode=0o777)
    else:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        place = nullcontext(partial)
    with place as partial:
        try:
            # Closed to others until its files have the permissions that they are to have.
            mode = stat.S_IMODE((target if target.exists() else partial).stat().st_mode)
            partial.chmod(0o700)
            yield partial
            _sync_tree(partial)
            partial.chmod(mode)
            _check_replaceable(target)
            _swap(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def sweep_beside(folder: Path) -> None:
    """Remove what processes that were killed while they wrote `folder` left beside it."""
    target = Path(os.path.realpath(folder))
    sweep(target.parent, _prefix(target, "partial"))
    if target.exists():  # else the old one is the only one
        sweep(target.parent, _prefix(target, "old"))


def check_writable(folder: PathLike) -> None:
    """Raise now what `save_split` and `strip` would raise of `folder` after their work.

    Raises:
        FileExistsError: it is a mount point, or exists, is not empty, and is no split checkpoint.
        NotADirectoryError, PermissionError: it could not be made where it is to be.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target)
    check_makeable(Path(folder))


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: expected a new folder or a split checkpoint")
    if target.is_mount():
        raise FileExistsError(
            f"{target} is where a disk is mounted, and no folder can be renamed into its place: "
            "nothing was written; choose a folder in it"
        )
    if any(target.iterdir()) and not is_split(target):
        raise FileExistsError(
            f"{target} is not empty and not a split checkpoint: nothing was written; choose "
            "another folder or empty this one"
        )


def _prefix(target: Path, word: str) -> str:
    return f".{target.name}.{word}-"


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        _move_in(partial, target)
    elif _exchange(partial, target):
        try:
            sync(target.parent)
        except BaseException:
            _exchange(partial, target)
            raise
        _remove_old(partial)
    else:
        old = target.parent / f"{_prefix(target, 'old')}{secrets.token_hex(6)}"
        os.rename(target, old)
        try:
            _move_in(partial, target)
        except BaseException:
            os.rename(old, target)
            raise
        _remove_old(old)


def _move_in(partial: Path, target: Path) -> None:
    os.rename(partial, target)
    try:
        sync(target.parent)
    except BaseException:
        os.rename(target, partial)
        raise


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the disk cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Python's os module lacks it
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0


def _remove_old(old: Path) -> None:
    # The new checkpoint is in place by now, so this must not look like a failed save; but what
    # stays behind may hold an ortho stream, so it must not go unsaid either.
    try:
        shutil.rmtree(old)
    except FileNotFoundError:  # another process sweeps it away, too
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        warnings.warn(f"the replaced checkpoint is still at {old}: {error}", stacklevel=2)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():  # a link is all in its folder, and may lead nowhere
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (not a folder on Windows, which has no such call)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
