"""The encrypted file: what is sealed opens again, by its key, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libortho import CheckpointError
from libortho.checkpoint import (
    OrthoKey,
    load_split,
    save_split,
    sealed,
    verify_split,
)
from libortho.errors import OrthoLocked

pytest.importorskip("cryptography")

ENC = "ortho.safetensors.enc"
KEY = OrthoKey(bytes(range(32)))
BASE = "ab" * 32


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 512, 1000])
def test_what_is_sealed_opens_again(
    open_by_the_page, length: int, small_chunks: None, tmp_path: Path
) -> None:
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
