"""A split with an encrypted ortho stream: saved, loaded, stripped, and its base without a key."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libortho import CheckpointError, OrthoStreamMissing, set_alpha
from libortho.alpha import ortho_layers
from libortho.checkpoint import (
    OrthoKey,
    encrypt_split,
    keys,
    load_split,
    ortho_access,
    save_split,
    sealed,
    strip,
    verify_split,
)
from libortho.errors import OrthoLocked

pytest.importorskip("cryptography")

ENC = "ortho.safetensors.enc"
KEY = OrthoKey(bytes(range(32)))
OTHER = OrthoKey(bytes(range(1, 33)))


def load_split_base(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_split(folder, base_only=True)(torch.tensor([[1, 5, 9]])).logits


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


def test_the_content_is_the_plain_file(open_by_the_page, saved: Path, locked: Path) -> None:
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


@pytest.mark.parametrize("name", ["ortho_config.json", "ortho.safetensors.enc"])
def test_half_an_ortho_does_not_keep_the_base_from_loading(name: str, locked: Path) -> None:
    (locked / name).unlink()
    assert load_split_base(locked).shape == (1, 3, 61)
    with pytest.raises(CheckpointError, match="half an ortho"):
        load_split(locked, key=KEY)


def test_strip(files_in, saved: Path, locked: Path, tmp_path: Path) -> None:
    found = strip(locked, tmp_path / "out", key=KEY)
    assert found.blocks == strip(saved, tmp_path / "plain").blocks > 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "plain")


def test_a_linked_ortho_is_not_called_encrypted(files_in, saved: Path, tmp_path: Path) -> None:
    # As huggingface_hub's cache has it: the link would be replaced, and the plain file stay.
    folder, blob = tmp_path / "snapshot", tmp_path / "blob"
    shutil.copytree(saved, folder)
    (folder / "ortho.safetensors").rename(blob)
    (folder / "ortho.safetensors").symlink_to("../blob")
    before = files_in(folder)
    with pytest.raises(CheckpointError, match=r"ortho\.safetensors: a link to .*blob, which would"):
        encrypt_split(folder, KEY)
    assert files_in(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob", "snapshot"]


def test_a_link_that_leads_nowhere_is_kept(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "locked")
    (tmp_path / "locked/notes.md").symlink_to("../gone")
    encrypt_split(tmp_path / "locked", KEY)
    assert (tmp_path / "locked/notes.md").readlink() == Path("../gone")
    load_split(tmp_path / "locked", key=KEY)


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
