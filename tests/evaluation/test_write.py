"""Where a job's results go."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from libortho.evaluation.write import run_folder


def test_no_two_runs_are_given_one_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("libortho.evaluation.write.time.strftime", lambda _: "2030-01-01-120000")
    with ExitStack() as stack:
        names = [stack.enter_context(run_folder(None)).as_posix() for _ in range(3)]
    assert names == [f"runs/2030-01-01-120000{more}" for more in ("", "-2", "-3")]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with run_folder(None) as folder:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", folder.name)


def test_a_folder_of_ones_own_is_taken_as_it_is(tmp_path: Path) -> None:
    with run_folder(tmp_path / "mine") as folder:
        assert folder == tmp_path / "mine"
        assert not folder.exists()
    folder.mkdir()
    with pytest.raises(KeyError), run_folder(folder):
        raise KeyError
    assert folder.is_dir()


@pytest.mark.parametrize("written", [False, True])
def test_a_run_that_fails_leaves_no_empty_folder(tmp_path: Path, monkeypatch, written) -> None:
    monkeypatch.chdir(tmp_path)

    def fail() -> None:
        with run_folder(None) as folder:
            if written:
                (folder / "job.json").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len([*Path("runs").iterdir()]) == written
