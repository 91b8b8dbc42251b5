"""A server whose ortho stream is encrypted: alpha 0 without the key, every alpha with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from libortho.checkpoint import OrthoKey, encrypt_split, keys

pytest.importorskip("cryptography")
pytest.importorskip("fastapi")

from libortho.serve.engine_transformers import TransformersEngine
from libortho.serve.limits import Limits
from libortho.serve.loading import load_for_serving

KEY = OrthoKey(bytes(range(32)))


@pytest.mark.parametrize(
    ("key", "state", "highest"),
    [
        (None, "locked", 0.0),
        (KEY.secret.hex(), "present", 1.0),
        ("11" * 32, "unusable", 0.0),
        ("no key at all", "unusable", 0.0),
    ],
)
def test_an_encrypted_split(
    canary: Path, tmp_path: Path, monkeypatch, key: str | None, state: str, highest: float
) -> None:
    import shutil

    for name in keys.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = Path(shutil.copytree(canary, tmp_path / "split"))
    encrypt_split(folder, KEY)
    if key is not None:
        monkeypatch.setenv(keys.KEY_VARIABLE, key)
    status = TransformersEngine(load_for_serving(folder), Limits()).status()
    assert (status.ortho, status.max_alpha, status.serves(1.0)) == (state, highest, highest == 1)
