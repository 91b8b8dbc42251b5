"""Where a job's results go."""

from __future__ import annotations

import re
from pathlib import Path

from libortho.evaluation.write import run_folder


def test_no_two_runs_are_given_one_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("libortho.evaluation.write.time.strftime", lambda _: "2030-01-01-120000")
    names = [run_folder(None).as_posix() for _ in range(3)]
    assert names == [f"runs/2030-01-01-120000{more}" for more in ("", "-2", "-3")]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", run_folder(None).name)


def test_a_folder_of_ones_own_is_taken_as_it_is(tmp_path: Path) -> None:
    assert run_folder(tmp_path / "mine") == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()
