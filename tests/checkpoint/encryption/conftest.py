"""What the tests of encryption share: a locked split, and a reader made from the format's page."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from libortho.checkpoint import (
    OrthoKey,
    encrypt_split,
    keys,
    sealed,
)

KEY = OrthoKey(bytes(range(32)))


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
    pytest.importorskip("cryptography")
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


def _open_by_the_page(data: bytes, key: OrthoKey) -> bytes:
    """What docs/checkpoint-format.md says of the encrypted file, in the fewest words."""
    magic, version, chunk, length, base, key_id, nonce, wrapped = struct.unpack_from(
        "<8sIIQ32s8s12s48s", data
    )
    assert (magic, version, key_id.hex()) == (b"ORTHOENC", 1, key.id)
    assert len(base) == 32
    aead = pytest.importorskip("cryptography.hazmat.primitives.ciphers.aead")
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


@pytest.fixture(scope="session")
def open_by_the_page() -> Callable[[bytes, OrthoKey], bytes]:
    """`open_by_the_page(data, key)`: the content of an encrypted file, as the page says."""
    return _open_by_the_page
