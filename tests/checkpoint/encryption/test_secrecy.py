"""Who may read the ortho stream at rest, and where nothing of it is."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from libortho import CheckpointError
from libortho.checkpoint import (
    OrthoKey,
    encrypt_split,
    keys,
    load_split,
    rotate_key,
    save_split,
    sealed,
    verify_split,
)

pytest.importorskip("cryptography")

ENC = "ortho.safetensors.enc"
KEY = OrthoKey(bytes(range(32)))
OTHER = OrthoKey(bytes(range(1, 33)))


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077, 0o177])
def test_ortho_files_are_their_owners(split_model, umask: int, tmp_path: Path) -> None:
    model = split_model()
    before = os.umask(umask)
    try:
        save_split(model, tmp_path / "plain")
        save_split(model, tmp_path / "sealed", key=KEY)
        save_split(model, tmp_path / "later")
        encrypt_split(tmp_path / "later", KEY)
        rotate_key(tmp_path / "later", OTHER, old=KEY)
    finally:
        os.umask(before)
    modes = {
        f"{p.parent.name}/{p.name}": stat.S_IMODE(p.stat().st_mode)
        for p in tmp_path.glob("*/ortho*")
    }
    assert len(modes) == 6
    assert set(modes.values()) == {0o600}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_closed_folder_stays_closed(split_model, copy: Path) -> None:
    copy.chmod(0o700)
    encrypt_split(copy, KEY)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    save_split(split_model(), copy)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700


TRACED = """
import os, sys
from libortho.checkpoint import OrthoKey, load_split
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (
        os.O_WRONLY | os.O_RDWR | os.O_CREAT
    ):
        opened.append(str(arguments[0]))
import transformers, torch, transformers.models.llama.modeling_llama
load_split(sys.argv[2])
sys.addaudithook(hook)
load_split(sys.argv[1], key=OrthoKey(bytes(range(32))))
print(opened)
"""


def test_opening_writes_no_file(locked: Path, saved: Path) -> None:
    # In a process of its own: an audit hook stays for good. Chunks are of the usual size there.
    shutil.rmtree(locked)
    shutil.copytree(saved, locked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "CHUNK", 2**20)
        encrypt_split(locked, KEY)
    done = subprocess.run(
        [sys.executable, "-c", TRACED, str(locked), str(saved)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_nothing_of_it_is_shown(
    rewrite, edit, locked: Path, saved: Path, tmp_path: Path, caplog, capsys
) -> None:
    """Not in a repr, a log, a report, or an error's text or trace."""
    import logging
    import traceback

    from libortho import separation_report

    caplog.set_level(logging.DEBUG)
    # A number that is nowhere else, in every value of the stream.
    telling = 1234.5
    (tmp_path / "plain").mkdir()
    plain = Path(shutil.copytree(saved, tmp_path / "plain" / "x"))

    def mark(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("values"):
                tensor.fill_(telling)

    rewrite(plain, "ortho", mark)
    encrypt_split(plain, KEY)
    model = load_split(plain, key=KEY)
    found = verify_split(plain, key=KEY)
    said = [repr(model), repr(found), repr(separation_report(model)), str(separation_report(model))]
    said += [repr(KEY), str(KEY), repr(keys.Access(lambda: KEY))]
    for key in (None, OTHER):
        try:
            load_split(plain, key=key)
        except CheckpointError as error:
            said += [repr(error), "".join(traceback.format_exception(error))]
    edit(plain, lambda p: p.update(ortho_sha256="0" * 64), "ortho")
    with pytest.raises(CheckpointError) as caught:
        load_split(plain, key=KEY)
    said += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
    said += [caplog.text, *capsys.readouterr()]
    said += [(plain / name).read_text() for name in ("config.json", "README.md", "report.json")]
    said += [(plain / "ortho_config.json").read_text()]
    raw = torch.tensor([telling] * 2, dtype=torch.float16).numpy().tobytes()
    for text in said:
        assert not re.search(r"(?<![\w.])1234(?!\d)|1\.2345e", text)  # not digits of another number
        assert KEY.secret.hex() not in text
        assert str(KEY.secret)[2:-1] not in text
        assert repr(raw)[2:-1] not in text
    assert raw not in (plain / ENC).read_bytes()
