"""All or nothing on disk: a failure at any step leaves what was there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libortho.checkpoint import atomic, check_writable, load_split, save_split, strip, write

transformers = pytest.importorskip("transformers")


def failing(function: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    """`function`, raising instead of its call number `at` (from 0)."""
    calls = iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return function(*args, **kwargs)

    return call


STRIP = sys.modules["libortho.checkpoint.strip"]
"""The module, whose name in its package is its function's."""

STEPS: list[tuple[object, str, int]] = [
    (write, "save_file", 0),
    (write, "save_file", 1),
    (write, "digest", 0),
    (write, "digest", 1),
    (write, "_write_ortho", 0),
    (write, "_write_text", 0),
    (write, "check_files", 0),
    (transformers.PreTrainedConfig, "save_pretrained", 0),
    (shutil, "copymode", 0),
    (os, "fsync", 0),
    (os, "fsync", 5),
    (os, "fsync", 8),
    (os, "rename", 0),
    (os, "rename", 1),
]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("owner", "name", "at"), STEPS)
def test_a_failed_save_changes_nothing(
    split_model,
    assert_same_model,
    files_in,
    owner: object,
    name: str,
    at: int,
    error: BaseException,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = files_in(copy)
    model = split_model(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, error))
        with pytest.raises(type(error)):
            save_split(model, copy)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert files_in(copy) == before
    load_split(copy)
    save_split(model, copy)
    assert_same_model(model, load_split(copy))
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [(shutil, "copyfile", 2), (STRIP, "search", 0), (os, "fsync", 0), (os, "rename", 0)],
)
def test_a_failed_strip_leaves_nothing(
    owner: object, name: str, at: int, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            strip(copy, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    strip(copy, tmp_path / "out")


def test_what_could_not_be_deleted_is_named(
    split_model, assert_same_model, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.shutil, "rmtree", failing(shutil.rmtree, 0, OSError("busy")))
    model = split_model(seed=1)
    with pytest.warns(UserWarning, match=r"still at .*\.copy\.old-.*busy"):
        save_split(model, copy)
    assert_same_model(model, load_split(copy))


def test_saving_replaces_a_split_checkpoint_as_a_whole(
    split_model, copy: Path, tmp_path: Path
) -> None:
    (copy / "report.json").write_text("{}")
    save_split(split_model(seed=1), copy)
    assert not (copy / "report.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_saving_into_new_empty_and_linked_folders(split_model, tmp_path: Path) -> None:
    model = split_model()
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for folder in ("new/deep", "empty", "link", "link"):
        save_split(model, tmp_path / folder)
        load_split(tmp_path / folder)
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "new", "real"]


def test_a_foreign_folder_or_file_is_never_touched(
    split_model, files_in, saved: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years")
    for target, match in ((foreign, "foreign is not empty"), (foreign / "thesis.txt", "is a file")):
        with pytest.raises(FileExistsError, match=match):
            save_split(split_model(), target)
        with pytest.raises(FileExistsError, match=match):
            strip(saved, target)
        with pytest.raises(FileExistsError, match=match):
            check_writable(target)
    with pytest.raises(NotADirectoryError, match=r"thesis\.txt is a file"):
        check_writable(foreign / "thesis.txt/below")
    for target in (saved, tmp_path / "new/deep"):
        check_writable(target)
    assert files_in(tmp_path) == {"foreign/thesis.txt": b"ten years"}


FULL_DISK = """
import resource, sys
from libortho.checkpoint import load_split, save_split
model = load_split(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save_split(model, sys.argv[1])
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
@pytest.mark.parametrize("limit", [100, 4000])
def test_a_full_disk(files_in, limit: int, copy: Path, tmp_path: Path) -> None:
    before = files_in(copy)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(copy), str(limit)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError:")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert files_in(copy) == before
    load_split(copy)
