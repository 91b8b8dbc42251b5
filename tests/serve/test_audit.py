"""The audit log's file: whole lines, for its owner's eyes, where it was meant to be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from libortho.serve.audit import AuditLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.mark.parametrize("again", [False, True])
def test_a_line_that_was_written_in_part_swallows_no_other(path, monkeypatch, again) -> None:
    log = AuditLog(path)
    with monkeypatch.context() as patch:
        real = os.write
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:20]))
        assert not log.write("admitted", {"request": "1"})
    assert log.failures == 1
    if again:
        log.reopen()
    assert log.write("admitted", {"request": "2"})
    assert log.write("finished", {"request": "2"})
    log.reopen()
    assert log.write("refused", {"request": "3"})
    part, *whole = path.read_text().splitlines()
    assert len(part) == 20
    assert [json.loads(line)["event"] for line in whole] == ["admitted", "finished", "refused"]


def test_a_log_that_was_there_becomes_its_owners_alone(path) -> None:
    path.write_text("")
    path.chmod(0o644)
    log = AuditLog(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    path.write_text("")
    path.chmod(0o640)
    log.reopen()
    assert path.stat().st_mode & 0o777 == 0o600


def test_only_a_plain_file_can_be_a_log(path) -> None:
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"expected a plain file: .*audit\.jsonl"):
        AuditLog(path)


def test_a_link_is_not_followed(path, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"audit\.jsonl"):
        AuditLog(path)
    path.unlink()
    log = AuditLog(path)
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"audit\.jsonl"):
        log.reopen()
    assert log.write("finished", {}), "the old file is still open"
    assert elsewhere.read_text() == ""
