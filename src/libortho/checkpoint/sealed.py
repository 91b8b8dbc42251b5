"""An ortho file that is encrypted: bytes in, bytes out, nothing of it on any disk in between.

The file has a key of its own, which the owner's key wraps, so that another owner's key needs a
new header and no more. The content is cut into chunks, each sealed with AES-256-GCM under a nonce
that counts them and marks the last (the STREAM construction: Hoang, Reyhanitabar, Rogaway and Vizar
2015, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance"): one that is changed,
moved, missing or left over does not open. Digest of the base and length go into every seal.

    offset  bytes
    0       8     "ORTHOENC"
    8       4     version, 1; little-endian, as all numbers but the nonce's
    12      4     bytes of content in a chunk, 2^20
    16      8     bytes of content
    24      32    base_sha256
    56      8     id of the owner's key
    64      12    nonce of the wrapping, random
    76      48    the file's key, wrapped: AES-256-GCM with bytes 0 to 63 as additional data
    124     ...   the chunks, each followed by its tag of 16 bytes; additional data: bytes 0 to 55;
                  nonce: 11 bytes that count the chunks from 0, big-endian, then 1 for the last one,
                  0 for any other
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from libortho.checkpoint.keys import KEY_BYTES, VARIABLES, OrthoKey, current_access
from libortho.errors import CheckpointError, LibOrthoError, OrthoLocked

CIPHER: Literal["AES-256-GCM"] = "AES-256-GCM"
MAGIC = b"ORTHOENC"
VERSION = 1
CHUNK = 2**20
TAG = 16
NONCE = 12
_FIXED = struct.Struct("<8sIIQ32s")
_HEADER = struct.Struct(f"<{_FIXED.size}s8s{NONCE}s{KEY_BYTES + TAG}s")


@dataclass(frozen=True)
class _Header:
    """What stands before the chunks; see the head of this module."""

    fixed: bytes
    length: int
    base_sha256: str
    key_id: str
    wrap_nonce: bytes
    wrapped: bytes

    @property
    def aad(self) -> bytes:
        """What is authenticated with the wrapped key."""
        return self.fixed + bytes.fromhex(self.key_id)


def seal(content: bytes, key: OrthoKey, base_sha256: str) -> bytes:
    """The encrypted file that holds `content`, bound to the base of this digest.

    Raises:
        LibOrthoError: the package cryptography is not installed.
    """
    chunks = max(1, -(-len(content) // CHUNK))
    fixed = _FIXED.pack(MAGIC, VERSION, CHUNK, len(content), bytes.fromhex(base_sha256))
    own = secrets.token_bytes(KEY_BYTES)
    parts = [_header(fixed, own, key)]
    cipher, view = _aes(own), memoryview(content)
    for index in range(chunks):
        part = view[index * CHUNK : (index + 1) * CHUNK]
        parts.append(cipher.encrypt(_nonce(index, chunks), part, fixed))
    return b"".join(parts)


def unseal(path: Path, key: OrthoKey | None, base_sha256: str) -> bytes:
    """The content of an encrypted file, all of it or none.

    Raises:
        OrthoLocked: there is no key.
        CheckpointError: the key is another one, or the file is damaged, truncated, or of another
            base.
        LibOrthoError: the package cryptography is not installed.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = _parse(path, file.read(_HEADER.size))
        left = os.fstat(file.fileno()).st_size - _HEADER.size
        chunks = max(1, -(-header.length // CHUNK))
        if left != header.length + chunks * TAG:
            raise CheckpointError(
                f"{path}: holds {left} bytes of content and tags, its header says "
                f"{header.length + chunks * TAG}: truncated, or damaged"
            )
        if header.base_sha256 != base_sha256:
            raise CheckpointError(
                f"{path}: made for the base with sha256 {header.base_sha256[:12]}..., this one is "
                f"{base_sha256[:12]}...: the two are not of one split"
            )
        cipher = _aes(_unwrap(path, header, key))
        return b"".join(_opened_chunks(path, file, cipher, header, chunks))


def rewrap(path: Path, old: OrthoKey | None, new: OrthoKey) -> bytes:
    """An encrypted file's header, with the file's own key wrapped by another owner's key.

    Raises:
        As `unseal`, of the header alone.
    """
    with path.open("rb") as file:
        header = _parse(path, file.read(_HEADER.size))
    return _header(header.fixed, _unwrap(path, header, old), new)


def _header(fixed: bytes, own: bytes, key: OrthoKey) -> bytes:
    key_id, nonce = bytes.fromhex(key.id), secrets.token_bytes(NONCE)
    wrapped = _aes(key.secret).encrypt(nonce, own, fixed + key_id)
    return _HEADER.pack(fixed, key_id, nonce, wrapped)


def _parse(path: Path, head: bytes) -> _Header:
    if len(head) != _HEADER.size:
        raise CheckpointError(f"{path}: {len(head)} bytes, which is less than a header: truncated")
    fixed, key_id, nonce, wrapped = _HEADER.unpack(head)
    magic, version, chunk, length, base = _FIXED.unpack(fixed)
    if magic != MAGIC or (version == VERSION and chunk != CHUNK):
        raise CheckpointError(f"{path}: damaged, or not an encrypted ortho file")
    if version != VERSION:
        raise CheckpointError(
            f"{path}: version {version}: this version of libortho reads {VERSION}"
        )
    return _Header(fixed, length, base.hex(), key_id.hex(), nonce, wrapped)


def _unwrap(path: Path, header: _Header, key: OrthoKey | None) -> bytes:
    if key is None:
        raise OrthoLocked(
            f"{path}: the ortho stream is locked (encrypted with the key {header.key_id}), and "
            f"there is no key: set one of {', '.join(VARIABLES)}, or load the base alone"
        )
    if key.id != header.key_id:
        raise CheckpointError(
            f"{path}: encrypted with the key {header.key_id}, this one is {key.id}: the wrong key"
        )
    cipher = _aes(key.secret)
    try:
        return bytes(cipher.decrypt(header.wrap_nonce, header.wrapped, header.aad))
    except _invalid_tag():
        raise CheckpointError(f"{path}: its header is damaged") from None


def _opened_chunks(
    path: Path, file: Any, cipher: Any, header: _Header, chunks: int
) -> Iterator[bytes]:
    for index in range(chunks):
        try:
            sealed = file.read(min(CHUNK, header.length - index * CHUNK) + TAG)
            yield cipher.decrypt(_nonce(index, chunks), sealed, header.fixed)
        except _invalid_tag():
            raise CheckpointError(
                f"{path}: chunk {index + 1} of {chunks} is damaged, or is not the one that belongs "
                "there"
            ) from None


def _nonce(index: int, chunks: int) -> bytes:
    return index.to_bytes(NONCE - 1, "big") + bytes([index == chunks - 1])


def sealing_key() -> OrthoKey | None:
    """The key in use here, if there is one: asked before the work, it cannot fail after it.

    Raises:
        ValueError, OSError: as `OrthoKey.from_environment`, or of the caller's own function.
        LibOrthoError: there is a key, and the package that seals with it is not installed.
    """
    key = current_access().find_key()
    if key is not None:
        _aes(key.secret)
    return key


def _aes(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise LibOrthoError(
            f"{error}: an encrypted ortho stream needs `pip install '.[vault]'` in a checkout of "
            "LibOrtho"
        ) from None
    return AESGCM(key)


def _invalid_tag() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag
