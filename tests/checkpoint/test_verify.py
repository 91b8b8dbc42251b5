"""Files that were truncated, changed or exchanged are found before a model is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from libortho import CheckpointError
from libortho.checkpoint import load_split, read_manifest, save_split, verify_split
from libortho.checkpoint.tensorfile import digest, read_entries

FILES = {"base": "model.safetensors", "ortho": "ortho.safetensors"}


def test_rewriting_alone_does_no_harm(rewrite, copy: Path) -> None:
    for file in ("base", "ortho"):
        rewrite(copy, file, lambda tensors: None)
    load_split(copy)


@pytest.mark.parametrize("file", ["base", "ortho"])
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files(file: str, keep: int, copy: Path) -> None:
    path = copy / FILES[file]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{FILES[file]}: truncated"):
        load_split(copy)


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "when"),
    [
        (f"{LAYER}.base.qdata", "loaded"),
        (f"{LAYER}.base.scale", "loaded"),
        (f"{LAYER}.ortho.values", "loaded"),
        ("model.embed_tokens.weight", "verified"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_one_flipped_bit_is_found(name: str, when: str, last: bool, copy: Path) -> None:
    which = "ortho" if ".ortho." in name else "base"
    path = copy / FILES[which]
    entry = read_entries(path)[name]
    data = bytearray(path.read_bytes())
    data[entry.stop - 1 if last else entry.start] ^= 1
    path.write_bytes(data)
    told = f"sha256 of the tensors in {FILES[which]}.*the {which} is damaged"
    with pytest.raises(CheckpointError, match=told):
        verify_split(copy)
    if when == "loaded":
        with pytest.raises(CheckpointError, match=told):
            load_split(copy)
    else:
        load_split(copy)


def test_the_ortho_of_another_split_is_refused(
    split_model, saved: Path, copy: Path, tmp_path: Path
) -> None:
    # The same shapes throughout: nothing but the digests can tell.
    other = tmp_path / "other"
    save_split(split_model(kind="sparse", seed=1), other)
    mine = (copy / "ortho.safetensors").read_bytes()
    shutil.copy(other / "ortho.safetensors", copy)
    with pytest.raises(CheckpointError, match="the ortho is damaged or belongs to another"):
        load_split(copy)
    shutil.copy(other / "ortho_config.json", copy)
    with pytest.raises(CheckpointError, match=r"ortho_config\.json: made for the base"):
        load_split(copy)
    (copy / "ortho.safetensors").write_bytes(mine)
    with pytest.raises(CheckpointError, match=r"ortho_config\.json: made for the base"):
        load_split(copy)
    shutil.copy(other / "ortho.safetensors", copy)
    shutil.copy(other / "model.safetensors", copy)
    with pytest.raises(CheckpointError, match=r"ortho_config\.json: made for the base"):
        load_split(copy)
    shutil.copy(other / "config.json", copy)
    load_split(copy)
    # The base alone exchanged, without a word in any manifest.
    shutil.copy(saved / "model.safetensors", copy)
    with pytest.raises(CheckpointError, match="the base is damaged or belongs to another"):
        load_split(copy)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), max_size=3))
def test_the_digest_is_what_its_definition_says(
    digest_of, tmp_path_factory: pytest.TempPathFactory, seed: int, shape: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("digest")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "b": torch.randn(shape, generator=generator),
        "a.c": torch.randn(shape, generator=generator).to(torch.bfloat16),
        "a.b": torch.randint(-9, 9, (3, *shape), generator=generator).to(torch.int8),
    }
    save_file(tensors, folder / "one.safetensors")
    whole = digest(read_entries(folder / "one.safetensors"))
    assert whole == digest_of(folder / "one.safetensors")
    # Spread over two files, in another order, it is the same; with one bit changed it is not.
    save_file({"b": tensors["b"]}, folder / "two.safetensors")
    save_file({"a.b": tensors["a.b"], "a.c": tensors["a.c"]}, folder / "three.safetensors")
    parts = read_entries(folder / "two.safetensors") | read_entries(folder / "three.safetensors")
    assert digest(parts) == whole
    if tensors["a.b"].numel():
        tensors["a.b"].view(-1)[-1] ^= 1
        save_file(tensors, folder / "four.safetensors")
        assert digest(read_entries(folder / "four.safetensors")) != whole


def test_a_file_that_shrinks_while_it_is_read(copy: Path) -> None:
    entries = read_entries(copy / "model.safetensors")
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="became shorter"):
        digest(entries)


INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(split_model, tmp_path: Path) -> Path:
    save_split(split_model(kind="sparse"), tmp_path / "sharded", max_shard_size=9000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_shards_are_the_same_checkpoint(assert_same_model, saved: Path, sharded: Path) -> None:
    assert read_manifest(saved) == read_manifest(sharded)
    assert_same_model(load_split(saved), load_split(sharded))
    for name in ("ortho.safetensors", "ortho_config.json"):
        assert (saved / name).read_bytes() == (sharded / name).read_bytes()


@pytest.mark.usefixtures("forbid_use")
def test_wrong_shards(saved: Path, sharded: Path) -> None:
    first = min(sharded.glob("model-*.safetensors"))
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} is missing, though"):
        load_split(sharded)
    others = sorted(sharded.glob("model-*.safetensors"))
    shutil.copy(others[0], first)
    with pytest.raises(CheckpointError, match=f"is in {first.name} already"):
        load_split(sharded)
    first.write_bytes(kept[:-1])
    with pytest.raises(CheckpointError, match=f"{first.name}: truncated"):
        load_split(sharded)
    first.write_bytes(kept)
    shutil.copy(saved / "model.safetensors", sharded)
    with pytest.raises(CheckpointError, match="expected one of them"):
        load_split(sharded)
    (sharded / "model.safetensors").unlink()
    for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'):
        (sharded / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=r"index of shards|names no file"):
            load_split(sharded)
    for name in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors"):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="expected one in its folder"):
            load_split(sharded)
