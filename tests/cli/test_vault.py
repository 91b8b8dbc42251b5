"""`libortho encrypt`, `rotate-key`, and the key that every command honours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from libortho.checkpoint import OrthoKey, encrypt_split, keys, save_split
from libortho.cli import app

pytest.importorskip("cryptography")

KEY, OTHER = OrthoKey(bytes(range(32))), OrthoKey(bytes(range(1, 33)))


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output


def test_encrypt_rotate_and_use(tiny_llama, large_ortho, tmp_path: Path, monkeypatch) -> None:
    import libortho

    for name in keys.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    model = libortho.replace_linear_layers(tiny_llama())
    large_ortho(model)
    folder, one, two = tmp_path / "split", tmp_path / "one", tmp_path / "two"
    save_split(model, folder)
    one.write_text(KEY.secret.hex())
    two.write_text(OTHER.secret.hex())

    status, text = run("encrypt", folder, "--key-file", one)
    assert status == 0
    assert KEY.id in text
    assert not (folder / "ortho.safetensors").exists()
    status, text = run("encrypt", folder, "--key-file", one)
    assert status == 2
    assert "encrypted already" in text

    status, text = run("inspect", folder)
    assert status == 0
    assert "ortho stream: locked" in text
    status, text = run("strip", folder, "--out", tmp_path / "base")
    assert status == 2
    assert "is locked" in text
    assert "LIBORTHO_ORTHO_KEY" in text
    for way in (["--ortho-key-file", one], []):
        if not way:
            monkeypatch.setenv(keys.FILE_VARIABLE, str(one))
        status, text = run(*way, "inspect", folder, "--json", tmp_path / "x.json")
        assert status == 0, text
        assert "ortho stream: present" in text
        assert json.loads((tmp_path / "x.json").read_text())["ortho_present"] is True
    status, text = run("--ortho-key-file", two, "inspect", folder)
    assert status == 2
    assert "the wrong key" in text

    monkeypatch.delenv(keys.FILE_VARIABLE)
    status, text = run("rotate-key", folder, "--new", two)
    assert status == 2
    assert "there is no key" in text
    status, text = run("rotate-key", folder, "--old", one, "--new", two)
    assert (status, OTHER.id in text) == (0, True)
    status, text = run("--ortho-key-file", two, "strip", folder, "--out", tmp_path / "base")
    assert status == 0, text
    assert not list((tmp_path / "base").glob("ortho*"))
    monkeypatch.setenv(keys.FILE_VARIABLE, str(tmp_path / "none"))
    status, text = run("inspect", folder)
    assert status == 2
    assert f"{keys.FILE_VARIABLE}: {tmp_path / 'none'}: no such file" in text
    assert KEY.secret.hex() not in text


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--ortho-key-file", ["--ortho-key-file", "KEY", "inspect", "split"]),
        ("--key-file", ["encrypt", "split", "--key-file", "KEY"]),
        ("--new", ["rotate-key", "split", "--new", "KEY"]),
        ("--old", ["rotate-key", "split", "--new", "good", "--old", "KEY"]),
        ("--policy", ["serve", "split", "--policy", "KEY"]),
    ],
)
def test_a_missing_file_is_named_with_its_option(
    option: str, arguments: list[str], tiny_llama, large_ortho, tmp_path: Path, monkeypatch
) -> None:
    import libortho

    monkeypatch.chdir(tmp_path)
    model = libortho.replace_linear_layers(tiny_llama())
    large_ortho(model)
    save_split(model, "split")
    encrypt_split("split", KEY)
    (tmp_path / "good").write_text(KEY.secret.hex())
    (tmp_path / "folder").mkdir()
    for name, why in (("none", ": no such file"), ("folder", " is a folder: expected a file")):
        status, text = run(*(name if word == "KEY" else word for word in arguments))
        assert status == 2
        assert f"{option}: {name}{why}" in text
