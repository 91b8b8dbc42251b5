"""Keys: rotated, in use, no keys at all, and where they come from."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from libortho import CheckpointError, LibOrthoError
from libortho.checkpoint import (
    OrthoKey,
    encrypt_split,
    keys,
    load_split,
    ortho_access,
    rotate_key,
    strip,
    verify_split,
)
from libortho.checkpoint.sealed import sealing_key
from libortho.errors import OrthoLocked

pytest.importorskip("cryptography")

ENC = "ortho.safetensors.enc"
KEY = OrthoKey(bytes(range(32)))
OTHER = OrthoKey(bytes(range(1, 33)))


def test_rotating_changes_the_header_alone(
    assert_same_model, files_in, saved: Path, locked: Path, tmp_path: Path
) -> None:
    before = files_in(locked)
    (locked / "notes").mkdir()
    (locked / "notes" / "ortho_config.json").write_text("mine")
    rotate_key(locked, OTHER, old=KEY)
    after = files_in(locked)
    assert after.pop("notes/ortho_config.json") == b"mine"
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {ENC, "ortho_config.json"}
    assert before.keys() == after.keys()
    assert before[ENC][124:] == after[ENC][124:]
    assert before[ENC][:56] == after[ENC][:56]
    with pytest.raises(CheckpointError, match="the wrong key"):
        load_split(locked, key=KEY)
    assert_same_model(load_split(saved), load_split(locked, key=OTHER))
    assert [p.name for p in tmp_path.iterdir()] == ["locked"]


def test_what_rotating_refuses(files_in, locked: Path, saved: Path, tmp_path: Path) -> None:
    before = files_in(locked)
    with pytest.raises(CheckpointError, match="the wrong key"):
        rotate_key(locked, OTHER, old=OTHER)
    with pytest.raises(OrthoLocked, match="there is no key"):
        rotate_key(locked, OTHER)
    with pytest.raises(CheckpointError, match="not encrypted: `libortho encrypt` it"):
        rotate_key(saved, OTHER, old=KEY)
    with pytest.raises(CheckpointError, match="encrypted already"):
        encrypt_split(locked, OTHER)
    strip(saved, tmp_path / "base")
    with pytest.raises(CheckpointError, match="has no ortho stream"):
        encrypt_split(tmp_path / "base", KEY)
    path = locked / ENC
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        rotate_key(locked, OTHER, old=KEY)
    path.write_bytes(before[ENC])
    assert files_in(locked) == before


def test_a_failed_rotation_changes_nothing(
    files_in, locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_in(locked)
    with monkeypatch.context() as patch:

        def full(handle: int) -> None:
            raise OSError("disk full")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            rotate_key(locked, OTHER, old=KEY)
    assert files_in(locked) == before
    assert [p.name for p in tmp_path.iterdir()] == ["locked"]


def test_a_key_in_use_encrypts_what_is_saved(split_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(keys.KEY_VARIABLE, KEY.secret.hex())
    split_model().save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / ENC).is_file()
    assert not (tmp_path / "m" / "ortho.safetensors").exists()
    monkeypatch.delenv(keys.KEY_VARIABLE)
    with pytest.raises(OrthoLocked):
        load_split(tmp_path / "m")


SECRET = "00112233" * 8


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (keys.KEY_VARIABLE, SECRET[:-1], r"LIBORTHO_ORTHO_KEY is no key.* got 63 bytes"),
        (keys.KEY_VARIABLE, SECRET[:-1] + "x", "LIBORTHO_ORTHO_KEY is no key"),
        (keys.FILE_VARIABLE, __file__, "the key file .*test_keys.py is no key"),
        (keys.COMMAND_VARIABLE, f"{sys.executable} -c 'exit(3)'", "exited with status 3"),
        (keys.COMMAND_VARIABLE, "no-such-program-anywhere", "cannot be run"),
        (keys.COMMAND_VARIABLE, f"{sys.executable} -c 'print(7)'", "prints is no key"),
        (keys.COMMAND_VARIABLE, "print 'it", r"LIBORTHO_ORTHO_KEY_COMMAND: .* \(No closing quot"),
        (keys.KEY_VARIABLE, os.fsdecode(b"\xff" * 64), "LIBORTHO_ORTHO_KEY is no key.* got 64 byt"),
    ],
)
def test_what_is_no_key(name: str, value: str, match: str, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match) as caught:
        OrthoKey.from_environment()
    assert SECRET[:8] not in str(caught.value)


def test_a_key_that_is_none_is_not_blamed_on_the_model(locked: Path, monkeypatch) -> None:
    monkeypatch.setenv(keys.KEY_VARIABLE, SECRET[:-1])
    said = r"locked/ortho\.safetensors\.enc: LIBORTHO_ORTHO_KEY is no key"
    for use in (load_split, verify_split):
        with pytest.raises(CheckpointError, match=said):
            use(locked)


@pytest.mark.parametrize("name", keys.VARIABLES)
@pytest.mark.parametrize("value", ["", " \n"])
def test_an_empty_variable_is_no_leave_to_write_plain(
    split_model, name: str, value: str, tmp_path: Path, monkeypatch
) -> None:
    # What `${SECRET_PATH}` becomes in a unit or compose file where nobody set it.
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is set and empty: expected .*, or no such"):
        split_model().save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_looked_at_before_the_base_is_written(
    split_model, tmp_path: Path, monkeypatch
) -> None:
    from libortho.checkpoint import write

    monkeypatch.setattr(write, "_write_base", lambda *_: pytest.fail("the base was written first"))
    monkeypatch.setenv(keys.FILE_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="missing"):
        split_model().save_pretrained(tmp_path / "m")


def test_one_key_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert OrthoKey.from_environment() is None
    monkeypatch.setenv(keys.KEY_VARIABLE, SECRET)
    monkeypatch.setenv(keys.FILE_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="LIBORTHO_ORTHO_KEY_FILE and LIBORTHO_ORTHO_KEY are set"):
        OrthoKey.from_environment()
    monkeypatch.delenv(keys.KEY_VARIABLE)
    with pytest.raises(FileNotFoundError, match="missing"):
        OrthoKey.from_environment()


def test_keys_of_another_kind() -> None:
    with pytest.raises(ValueError, match="a key of 16 bytes: expected 32"):
        OrthoKey(bytes(16))
    with pytest.raises(TypeError, match="a key is a str: expected bytes"):
        OrthoKey("x" * 32)  # type: ignore[arg-type]
    with (
        pytest.raises(TypeError, match="key is a str: expected an OrthoKey"),
        ortho_access("x" * 32),  # type: ignore[arg-type]
    ):
        pass


def test_a_key_is_of_one_thread() -> None:
    seen = []
    with ortho_access(KEY):
        thread = threading.Thread(target=lambda: seen.append(keys.current_access().find_key()))
        thread.start()
        thread.join()
        assert keys.current_access().find_key() == KEY
        with ortho_access(base_only=True):
            assert keys.current_access().find_key() == KEY
            assert keys.current_access().base_only
    assert seen == [None]
    assert keys.current_access() == keys.Access()


def test_without_the_package(saved: Path, locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    load_split(saved)
    with pytest.raises(LibOrthoError, match=r"pip install '\.\[vault\]'"):
        load_split(locked, key=KEY)
    # Not after the work whose result is to be written: where it begins.
    assert sealing_key() is None
    with ortho_access(KEY), pytest.raises(LibOrthoError, match="vault"):
        sealing_key()
