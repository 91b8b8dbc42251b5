"""All or nothing on disk: a failure at any step leaves what was there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libortho.checkpoint import (
    atomic,
    check_writable,
    load_split,
    read_manifest,
    save_split,
    strip,
    verify_split,
    write,
)

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
    (write, "save_aligned", 0),
    (write, "save_aligned", 1),
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
    (atomic, "_check_replaceable", 1),
]


@pytest.fixture(params=["one step", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replace a folder in the one step that Linux has, and as it is done elsewhere."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    return str(request.param)


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


@pytest.mark.parametrize(("name", "at"), [("rename", 0), ("rename", 1), ("fsync", 8)])
def test_a_failed_swap_changes_nothing(
    split_model, files_in, way: str, name: str, at: int, copy: Path, tmp_path: Path, monkeypatch
) -> None:
    if way == "one step" and name == "rename":
        pytest.skip("nothing is renamed")
    before = files_in(copy)
    # The last flush is that of the folder around it, after the swap.
    assert name != "fsync" or at == len(before) + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), at, OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_split(split_model(seed=1), copy)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert files_in(copy) == before


SAVE_FOREVER = """
import sys
from libortho.checkpoint import load_split, save_split
models = [load_split(folder) for folder in sys.argv[2:]]
print("ready", flush=True)
while True:
    for model in models:
        save_split(model, sys.argv[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_killed_at_any_instant(saved: Path, saved_low_rank: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(saved, target)
    known = {read_manifest(folder).base_sha256 for folder in (saved, saved_low_rank)}
    command = [sys.executable, "-c", SAVE_FOREVER, target, saved, saved_low_rank]
    found = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        end = time.monotonic() + 60
        while len(found) < 2 or len(os.listdir(tmp_path)) == 1:  # until it is killed in the middle
            assert time.monotonic() < end
            found.add(read_manifest(target).base_sha256)
        process.kill()
    assert found == known
    assert verify_split(target).manifest.base_sha256 in known


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


@pytest.mark.usefixtures("way")
def test_what_could_not_be_deleted_is_named(
    split_model, assert_same_model, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.shutil, "rmtree", failing(shutil.rmtree, 0, OSError("busy")))
    model = split_model(seed=1)
    with pytest.warns(UserWarning, match=r"still at .*\.copy\.(old|partial)-.*busy"):
        save_split(model, copy)
    assert_same_model(model, load_split(copy))


@pytest.mark.usefixtures("way")
def test_saving_replaces_a_split_checkpoint_as_a_whole(
    split_model, copy: Path, tmp_path: Path
) -> None:
    (copy / "notes.txt").write_text("{}")
    save_split(split_model(seed=1), copy)
    assert not (copy / "notes.txt").exists()
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


def test_the_place_of_a_mounted_disk_is_refused_before_any_work(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No folder can be renamed into its place, which would be found when all is done.
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mounted)
    for use in (check_writable, lambda folder: strip(saved, folder)):
        with pytest.raises(FileExistsError, match=r"mounted is where a disk is mounted.* in it"):
            use(mounted)
    assert list(tmp_path.iterdir()) == [mounted]
    check_writable(mounted / "split")


FULL_DISK = """
import resource, sys
from libortho.checkpoint import load_split, save_split
model = load_split(sys.argv[1])
sys.dont_write_bytecode = True  # Python would leave half a file of it for the next to stumble over
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
