"""Unfinished files: kept while their process lives, swept away by the next once it does not."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import stat
import sys
from pathlib import Path

import pytest

from libortho import files
from libortho.files import claim, replacing, scratch, sweep, unfinished, write_json, write_text

linux = pytest.mark.skipif(sys.platform == "win32", reason="no such locks")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave(place: Path, prefix: str, folder: bool) -> None:
    """Be gone in the middle of it, without a chance to clean up."""
    with scratch(place, prefix, folder=folder) as path:
        ((path / "half") if folder else path).write_text("half")
        os._exit(7)


def left_by_another(place: Path, prefix: str, folder: bool) -> Path:
    process = multiprocessing.get_context("fork").Process(
        target=leave, args=(place, prefix, folder)
    )
    process.start()
    process.join()
    assert process.exitcode == 7
    (path,) = (p for p in place.iterdir() if p.name.startswith(prefix))
    return path


@linux
@pytest.mark.parametrize("folder", [False, True])
def test_what_the_dead_left_is_removed_and_what_the_living_have_is_not(
    folder: bool, tmp_path: Path
) -> None:
    left_by_another(tmp_path, ".x-", folder)
    with scratch(tmp_path, ".x-", folder=folder) as mine:
        assert names(tmp_path) == {mine.name}
        assert stat.S_IMODE(mine.stat().st_mode) == (0o700 if folder else 0o600)
        assert claim(mine) is None
        with scratch(tmp_path, ".x-", folder=folder) as other:
            assert names(tmp_path) == {mine.name, other.name}
        assert names(tmp_path) == {mine.name}
    assert names(tmp_path) == set()


@linux
def test_nothing_else_is_touched(tmp_path: Path) -> None:
    left_by_another(tmp_path, ".y-", True)
    mine = {
        ".x-notes",
        ".x-0123456789abcd",
        ".x-0123456789aX",
        "x-0123456789ab",
        ".xx-0123456789ab",
    }
    for name in mine:
        (tmp_path / name).write_text("ten years")
    (tmp_path / "thesis").mkdir()
    (tmp_path / ".x-ffffffffffff").symlink_to(tmp_path / "thesis")
    (other,) = tmp_path.glob(".y-*")
    sweep(tmp_path, ".x-")
    assert names(tmp_path) == {*mine, "thesis", ".x-ffffffffffff", other.name}
    sweep(tmp_path / "nowhere", ".x-")


@linux
def test_what_is_swept_away_before_it_is_claimed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def swept_once(path: Path) -> int | None:
        seen.append(path)
        if len(seen) == 1:
            sweep(tmp_path, ".x-")
        return claim(path)

    monkeypatch.setattr(files, "claim", swept_once)
    # The sweep itself asks, too, of what it finds.
    with scratch(tmp_path, ".x-") as path:
        assert path.is_file()
        assert names(tmp_path) == {path.name}
    assert len({p.name for p in seen}) == 2


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / ".x-0123456789ab").write_text("whose?")
    monkeypatch.setattr(files, "fcntl", None)
    with scratch(tmp_path, ".x-", folder=True) as path:
        assert path.is_dir()
    assert names(tmp_path) == {".x-0123456789ab"}


def test_files_are_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="serializable"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_text(path, "other")

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "other"
    assert names(path.parent) == {"x.json"}


@linux
def test_writing_a_file_removes_what_was_left_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    left_by_another(tmp_path, unfinished(path), False)
    write_json(path, [])
    assert names(tmp_path) == {"x.json"}


def test_json_has_null_where_it_lacks_a_number(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [math.nan, 1.5], "b": (math.inf, -math.inf), "c": "NaN"})
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, 1.5], "b": [None, None], "c": "NaN"}


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    made = tmp_path / "made"

    def fail() -> None:
        with replacing(made, folder=True) as partial:
            (partial / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with replacing(made, folder=True) as partial:
        (partial / "whole").touch()
        assert not made.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "whole"]
