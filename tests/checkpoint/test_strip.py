"""strip: a deployment without memory, and a search that would find it if it were there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from libortho import BaseConfig, CheckpointError, OrthoStreamMissing, alpha_scope, set_alpha
from libortho.alpha import ortho_layers
from libortho.base import HalfBase
from libortho.checkpoint import load_split, save_split, strip
from libortho.checkpoint.search import BLOCK, Found, Searched, _Blocks, search
from libortho.checkpoint.tensorfile import read_entries
from libortho.layer import OrthoLinear
from libortho.linear import install

pytest.importorskip("transformers")


def test_strip_has_no_memory(assert_same_model, files_in, saved: Path, tmp_path: Path) -> None:
    (spare := tmp_path / "with-spare", out := tmp_path / "out")
    shutil.copytree(saved, spare)
    shutil.copy(saved / "ortho.safetensors", spare / "spare.safetensors")
    shutil.copy(saved / "ortho.safetensors", spare / "tokenizer.json.bak")
    (spare / "vocab.txt").write_text("a tokenizer's")
    result = strip(spare, out)
    public = {k: v for k, v in files_in(saved).items() if not k.startswith("ortho")}
    assert files_in(out) == public | {"vocab.txt": b"a tokenizer's"}
    assert set(result.files) == set(files_in(out))
    assert result.nbytes == sum(len(data) for data in files_in(out).values())
    assert result.tensors + len(result.silent) == 6
    full, base = load_split(saved), load_split(out)
    assert_same_model(full, base, ortho=False)
    assert all(layer.ortho is None for layer in ortho_layers(base).values())
    with pytest.raises(OrthoStreamMissing):
        set_alpha(base, 0.5)
    with pytest.raises(OrthoStreamMissing), alpha_scope(base, 1.0):
        pass
    # The ortho files of the same split make it whole again.
    for name in ("ortho.safetensors", "ortho_config.json"):
        shutil.copy(saved / name, out)
    assert_same_model(full, load_split(out))


def test_strip_never_replaces_its_source(files_in, copy: Path, tmp_path: Path) -> None:
    before = files_in(copy)
    (tmp_path / "link").symlink_to(copy)
    inner = Path(shutil.copytree(copy, copy / "inner"))
    for source, out in ((copy, copy), (copy, tmp_path / "link"), (inner, copy), (copy, inner)):
        with pytest.raises(ValueError, match="would replace or lie in"):
            strip(source, out)
    shutil.rmtree(inner)
    assert files_in(copy) == before


def test_ortho_bytes_in_a_file_that_is_copied_are_found(copy: Path, tmp_path: Path) -> None:
    values = next(e for n, e in read_entries(copy / "ortho.safetensors").items() if "values" in n)
    data = (copy / "ortho.safetensors").read_bytes()[values.start : values.stop]
    with (copy / "README.md").open("ab") as file:
        file.write(b"x" + data[-BLOCK:])
    with pytest.raises(CheckpointError, match=r"README\.md: holds bytes of .*ortho\.values"):
        strip(copy, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_a_base_that_hides_the_ortho_is_found(split_model, tmp_path: Path) -> None:
    # A bug somewhere: the base of one layer holds the factor of another, byte for byte.
    model = split_model()
    layers = ortho_layers(model)
    name, layer = next(iter(layers.items()))
    hidden = layers["model.layers.1.mlp.down_proj"].ortho.right.view(torch.float16)
    qdata = torch.randn(layer.base.shape).to(torch.float16)
    qdata[5:8] = hidden
    install(model, {name: OrthoLinear.from_streams(HalfBase(qdata), layer.ortho, None)})
    save_split(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: holds bytes of .*ortho\.right"):
        strip(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_only_is_stripped_without_a_search(saved: Path, tmp_path: Path) -> None:
    strip(saved, tmp_path / "once")
    again = strip(tmp_path / "once", tmp_path / "twice")
    assert (again.tensors, again.blocks, again.silent) == (0, 0, ())


def test_a_damaged_checkpoint_is_not_stripped(copy: Path, tmp_path: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="the base is damaged"):
        strip(copy, tmp_path / "out")


@settings(max_examples=60)
@given(data=st.data())
def test_the_search_finds_what_a_plain_search_finds(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, monkeypatch_chunk: None
) -> None:
    folder = tmp_path_factory.mktemp("search")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = data.draw(st.integers(16, 200))
    tensor = torch.randint(-128, 127, (size,), generator=generator).to(torch.int8)
    save_file({"t": tensor}, folder / "t.safetensors")
    raw = tensor.numpy().tobytes()
    noise = torch.randint(-128, 127, (700,), generator=generator).to(torch.int8).numpy().tobytes()
    start = data.draw(st.integers(0, size - 1))
    piece = raw[start : start + data.draw(st.integers(0, size))]
    place = data.draw(st.integers(0, len(noise)))
    text = noise[:place] + piece + noise[place:]
    (folder / "f.bin").write_bytes(text)
    starts = [*range(0, size - BLOCK + 1, BLOCK), *([size - BLOCK] if size > BLOCK else [])]
    places = [text.find(raw[s : s + BLOCK]) for s in starts]
    expected = min((p for p in places if p >= 0), default=None)
    result = search(read_entries(folder / "t.safetensors"), folder, ["f.bin"])
    if expected is None:
        assert isinstance(result, Searched)
        assert result.nbytes == len(text)
    else:
        assert result == Found("t", "f.bin", expected)


@pytest.fixture(scope="module")
def monkeypatch_chunk() -> object:
    """Files are read in pieces so small that blocks lie across their borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("libortho.checkpoint.search.CHUNK", 50)
        yield


def test_many_blocks_do_not_fill_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where most of its places are taken, most of every file would have to be compared in full.
    monkeypatch.setattr("libortho.checkpoint.search._TABLE_BITS", 10)
    numbers = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (5000 * BLOCK,), generator=numbers).to(torch.uint8).numpy()
    sought = _Blocks({raw[i : i + BLOCK].tobytes(): "t" for i in range(0, len(raw), BLOCK)})
    assert sought._table.mean() < 0.1
    assert sought.find(b"abc" + raw[-BLOCK:].tobytes()) == 3
    assert sought.find(raw[1:BLOCK].tobytes()) is None


def test_what_tells_nothing_is_named_and_not_sought(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.zeros(0),
        "short": torch.arange(3),
        "zeros": torch.zeros(100),
        "two": torch.arange(2).repeat(50),
        "real": torch.randn(100),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    (tmp_path / "f").write_bytes(bytes(1000))
    found = search(read_entries(tmp_path / "t.safetensors"), tmp_path, ["f"])
    assert isinstance(found, Searched)
    assert set(found.silent) == {"empty", "short", "zeros", "two"}
    assert (found.tensors, found.nbytes) == (1, 1000)


def test_every_base_storage_strips_clean(split_model, base: BaseConfig, tmp_path: Path) -> None:
    save_split(split_model("gpt2", "sparse", base), tmp_path / "m")
    result = strip(tmp_path / "m", tmp_path / "b")
    held = load_file(tmp_path / "m/ortho.safetensors")
    assert result.tensors + len(result.silent) == len(held)
    assert result.blocks > 0
