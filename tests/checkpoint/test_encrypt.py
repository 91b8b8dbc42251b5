"""The ortho stream at rest: encrypted, opened by its key alone, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from libortho import CheckpointError, LibOrthoError, OrthoStreamMissing, set_alpha
from libortho.alpha import ortho_layers
from libortho.checkpoint import (
    OrthoKey,
    encrypt_split,
    keys,
    load_split,
    ortho_access,
    rotate_key,
    save_split,
    sealed,
    strip,
    verify_split,
)
from libortho.errors import OrthoLocked

aead = pytest.importorskip("cryptography.hazmat.primitives.ciphers.aead")

ENC = "ortho.safetensors.enc"
KEY = OrthoKey(bytes(range(32)))
OTHER = OrthoKey(bytes(range(1, 33)))
BASE = "ab" * 32


@pytest.fixture(autouse=True)
def _no_key_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in keys.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tiny streams of these tests have many chunks."""
    monkeypatch.setattr(sealed, "CHUNK", 256)


@pytest.fixture(scope="session")
def _locked_once(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("locked") / "copy"
    shutil.copytree(saved, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "CHUNK", 256)
        encrypt_split(folder, KEY)
    return folder


@pytest.fixture
def locked(_locked_once: Path, small_chunks: None, tmp_path: Path) -> Path:
    """A split with an encrypted ortho stream of many chunks, to be changed."""
    return Path(shutil.copytree(_locked_once, tmp_path / "locked"))


def open_by_the_page(data: bytes, key: OrthoKey) -> bytes:
    """What docs/checkpoint-format.md says of the encrypted file, in the fewest words."""
    magic, version, chunk, length, base, key_id, nonce, wrapped = struct.unpack_from(
        "<8sIIQ32s8s12s48s", data
    )
    assert (magic, version, key_id.hex()) == (b"ORTHOENC", 1, key.id)
    assert len(base) == 32
    own = aead.AESGCM(aead.AESGCM(key.secret).decrypt(nonce, wrapped, data[:64]))
    content, at, index = b"", 124, 0
    while at < len(data):
        part = data[at : at + chunk + 16]
        at += len(part)
        last = at == len(data)
        content += own.decrypt(index.to_bytes(11, "big") + bytes([last]), part, data[:56])
        index += 1
    assert len(content) == length
    return content


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 512, 1000])
def test_what_is_sealed_opens_again(length: int, small_chunks: None, tmp_path: Path) -> None:
    content = os.urandom(length)
    path = tmp_path / "x"
    path.write_bytes(sealed.seal(content, KEY, BASE))
    assert sealed.unseal(path, KEY, BASE) == content
    assert open_by_the_page(path.read_bytes(), KEY) == content
    assert len(path.read_bytes()) == 124 + length + 16 * max(1, -(-length // 256))


def test_no_two_files_share_a_key() -> None:
    one, two = (sealed.seal(b"the same", KEY, BASE) for _ in range(2))
    assert one[124:] != two[124:]
    assert one[64:124] != two[64:124]


@given(data=st.data())
def test_any_flipped_bit_is_an_error(data: st.DataObject, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("x") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "CHUNK", 16)
        whole = bytearray(sealed.seal(bytes(range(40)), KEY, BASE))
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
        with pytest.raises(CheckpointError, match="x: "):
            sealed.unseal(path, KEY, BASE)


def chunk_of(index: int) -> slice:
    return slice(124 + index * 272, 124 + (index + 1) * 272)


def exchange(data: bytes) -> bytes:
    one, two = data[chunk_of(0)], data[chunk_of(1)]
    return data[:124] + two + one + data[chunk_of(1).stop :]


def without_the_last(data: bytes) -> bytes:
    """The last chunk is gone, and the length says so."""
    length = 2 * 256
    return data[:16] + length.to_bytes(8, "little") + data[24 : chunk_of(1).stop]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "one bit of a chunk": (
        lambda d: d[:400] + bytes([d[400] ^ 1]) + d[401:],
        "chunk 2 of .* damaged",
    ),
    "chunks exchanged": (exchange, "chunk 1 of .* belongs there"),
    "truncated": (lambda d: d[:-1], "truncated, or damaged"),
    "a chunk cut off": (lambda d: d[: chunk_of(1).stop], "truncated, or damaged"),
    "cut off, and so it says": (without_the_last, "header is damaged"),
    "only a header": (lambda d: d[:100], "100 bytes, which is less than a header"),
    "empty": (lambda d: b"", "0 bytes, which is less than a header"),
    "longer": (lambda d: d + b"\0", "truncated, or damaged"),
    "not such a file": (lambda d: b"\0" * len(d), "not an encrypted ortho file"),
    "the wrapped key": (lambda d: d[:100] + bytes([d[100] ^ 1]) + d[101:], "header is damaged"),
    "a later version": (
        lambda d: d[:8] + b"\2\0\0\0" + d[12:],
        "version 2: this version of libortho reads 1",
    ),
    "another base in the header": (lambda d: d[:24] + bytes(32) + d[56:], "not of one split"),
    "a wild length": (lambda d: d[:16] + b"\xff" * 8 + d[24:], "truncated, or damaged"),
}


@pytest.mark.usefixtures("forbid_use")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_error(damage: str, locked: Path) -> None:
    change, match = DAMAGES[damage]
    path = locked / ENC
    path.write_bytes(change(path.read_bytes()))
    for use in (load_split, verify_split):
        with pytest.raises(CheckpointError, match=match) as caught:
            use(locked, key=KEY)
        assert ENC in str(caught.value)
        assert not isinstance(caught.value, OrthoLocked)


def load_split_base(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_split(folder, base_only=True)(torch.tensor([[1, 5, 9]])).logits


@pytest.mark.usefixtures("forbid_use")
def test_the_file_of_another_split(split_model, locked: Path, tmp_path: Path) -> None:
    save_split(split_model(kind="sparse", seed=1), tmp_path / "other", key=KEY)
    shutil.copyfile(tmp_path / "other" / ENC, locked / ENC)
    with pytest.raises(CheckpointError, match="not of one split"):
        load_split(locked, key=KEY)


@pytest.mark.usefixtures("forbid_use")
def test_another_file_for_the_same_base(locked: Path) -> None:
    # Its seal is right, so only the digest in ortho_config.json can tell.
    path = locked / ENC
    plain = bytearray(sealed.unseal(path, KEY, verify_split(locked, key=KEY).manifest.base_sha256))
    plain[-1] ^= 1
    base = json.loads((locked / "ortho_config.json").read_text())["base_sha256"]
    path.write_bytes(sealed.seal(bytes(plain), KEY, base))
    with pytest.raises(CheckpointError, match="the ortho is damaged or belongs to another"):
        load_split(locked, key=KEY)


@pytest.mark.usefixtures("forbid_use")
def test_what_is_sealed_must_be_a_safetensors_file(locked: Path) -> None:
    base = json.loads((locked / "ortho_config.json").read_text())["base_sha256"]
    (locked / ENC).write_bytes(sealed.seal(b"\xff" * 100, KEY, base))
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        load_split(locked, key=KEY)


def test_the_config_must_say_what_is_there(edit, saved: Path, locked: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = Path(shutil.copytree(saved, tmp_path / "plain" / "x"))
    encryption = json.loads((locked / "ortho_config.json").read_text())["encryption"]
    assert encryption == {"cipher": "AES-256-GCM", "key_id": KEY.id}
    edit(plain, lambda p: p.update(encryption=encryption), "ortho")
    with pytest.raises(CheckpointError, match="says that the tensors are encrypted"):
        load_split(plain, key=KEY)
    edit(locked, lambda p: p.pop("encryption"), "ortho")
    with pytest.raises(CheckpointError, match="says that the tensors are plain"):
        load_split(locked, key=KEY)
    shutil.copyfile(saved / "ortho.safetensors", locked / "ortho.safetensors")
    with pytest.raises(CheckpointError, match=f"ortho.safetensors and {ENC}: expected one"):
        load_split(locked, key=KEY)
    for name in ("ortho.safetensors", "ortho_config.json"):
        (locked / name).unlink()
    with pytest.raises(CheckpointError, match=f"ortho_config.json is missing, and {ENC} is there"):
        load_split(locked, key=KEY)


# -- a split with it -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_round_trip_is_bit_for_bit(
    split_model, assert_same_model, kind: str, small_chunks: None, tmp_path: Path
) -> None:
    model = split_model(kind=kind)
    save_split(model, tmp_path / "m", key=KEY)
    assert not (tmp_path / "m" / "ortho.safetensors").exists()
    assert_same_model(model, load_split(tmp_path / "m", key=KEY))
    cast = load_split(tmp_path / "m", key=KEY, dtype=torch.bfloat16)
    for name, layer in ortho_layers(cast).items():
        for mine, theirs in zip(
            layer.ortho.buffers(), model.get_submodule(name).ortho.buffers(), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_the_content_is_the_plain_file(saved: Path, locked: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "CHUNK", 256)
        content = open_by_the_page((locked / ENC).read_bytes(), KEY)
    assert content == (saved / "ortho.safetensors").read_bytes()


def test_from_pretrained_and_the_environment(
    assert_same_model, saved: Path, locked: Path, tmp_path: Path, monkeypatch
) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "key").write_text(KEY.secret.hex() + "\n")
    program = tmp_path / "kms.py"
    program.write_text(f"print('{KEY.secret.hex()}')")
    expected = load_split(saved)
    for name, value in (
        (keys.FILE_VARIABLE, str(tmp_path / "key")),
        (keys.KEY_VARIABLE, KEY.secret.hex().upper()),
        (keys.COMMAND_VARIABLE, f"{sys.executable} {program}"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert_same_model(expected, AutoModelForCausalLM.from_pretrained(locked))
    with ortho_access(lambda: OrthoKey.from_hook(lambda: KEY.secret)):
        assert_same_model(expected, AutoModelForCausalLM.from_pretrained(locked))


@pytest.mark.usefixtures("forbid_use")
def test_without_its_key(locked: Path, tmp_path: Path) -> None:
    for use in (load_split, verify_split, lambda f: strip(f, tmp_path / "out")):
        with pytest.raises(OrthoLocked, match=f"locked .*{KEY.id}.* LIBORTHO_ORTHO_KEY") as caught:
            use(locked)
        assert isinstance(caught.value, CheckpointError)
        assert isinstance(caught.value, OrthoStreamMissing)
    assert not (tmp_path / "out").exists()
    for use in (load_split, verify_split, lambda f, key: strip(f, tmp_path / "out", key=key)):
        with pytest.raises(CheckpointError, match=f"with the key {KEY.id}, this one is {OTHER.id}"):
            use(locked, key=OTHER)


def test_the_base_alone_needs_no_key(saved: Path, locked: Path, tmp_path: Path) -> None:
    whole = load_split(saved)
    for folder in (locked, saved):
        base = load_split(folder, base_only=True)
        assert all(layer.ortho is None for layer in ortho_layers(base).values())
        with pytest.raises(OrthoStreamMissing, match=r"ortho stream of .* is locked"):
            set_alpha(base, 0.5)
        with pytest.raises(ValueError, match="left locked when"):
            save_split(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        ids = torch.tensor([[1, 5, 9]])
        assert torch.equal(load_split_base(locked), whole(ids).logits)


def test_a_damaged_ortho_does_not_keep_the_base_from_loading(locked: Path) -> None:
    (locked / "ortho_config.json").write_text("{")
    assert load_split_base(locked).shape == (1, 3, 61)


def test_strip(files_in, saved: Path, locked: Path, tmp_path: Path) -> None:
    found = strip(locked, tmp_path / "out", key=KEY)
    assert found.blocks == strip(saved, tmp_path / "plain").blocks > 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "plain")


def test_strip_finds_ortho_bytes_of_an_encrypted_split(locked: Path, saved: Path, tmp_path) -> None:
    values = next(t for n, t in load_file(saved / "ortho.safetensors").items() if "values" in n)
    with (locked / "README.md").open("ab") as file:
        file.write(values.view(torch.uint8).numpy().tobytes())
    with pytest.raises(CheckpointError, match="must not be in a base-only deployment"):
        strip(locked, tmp_path / "out", key=KEY)


def test_a_large_tensor_is_searched_for_whole(tmp_path: Path) -> None:
    # Longer than what is read at a time: its first bytes count as its last ones do.
    from libortho.checkpoint.search import Found, search
    from libortho.checkpoint.tensorfile import CHUNK, read_entries

    tensor = torch.randn(CHUNK // 4 + 1000)
    save_file({"a.ortho.left": tensor}, tmp_path / "x.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f").write_bytes(tensor[:64].numpy().tobytes())
    found = search(read_entries(tmp_path / "x.safetensors"), tmp_path / "out", ["f"])
    assert isinstance(found, Found)


# -- keys ----------------------------------------------------------------------------------------


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
        (keys.FILE_VARIABLE, __file__, "the key file .*test_encrypt.py is no key"),
        (keys.COMMAND_VARIABLE, f"{sys.executable} -c 'exit(3)'", "exited with status 3"),
        (keys.COMMAND_VARIABLE, "no-such-program-anywhere", "cannot be run"),
        (keys.COMMAND_VARIABLE, f"{sys.executable} -c 'print(7)'", "prints is no key"),
    ],
)
def test_what_is_no_key(name: str, value: str, match: str, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match) as caught:
        OrthoKey.from_environment()
    assert SECRET[:8] not in str(caught.value)


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
    with pytest.raises(LibOrthoError, match=r"pip install 'libortho\[vault\]'"):
        load_split(locked, key=KEY)


# -- who may read it, and where it is not --------------------------------------------------------


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
        assert "1234.5" not in text
        assert "1234" not in text.replace(KEY.secret.hex(), "!!1234!!")
        assert str(KEY.secret)[2:-1] not in text
        assert repr(raw)[2:-1] not in text
    assert raw not in (plain / ENC).read_bytes()
