"""export_split: all or nothing, never over something, and errors that say what would be right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from libortho import LibOrthoError
from libortho.checkpoint import load_split, read_manifest, save_split, strip
from libortho.export import TARGETS, DenseExport, PeftExport, export_split, registry
from libortho.export.registry import Target, register
from libortho.export.run import check_made_from


def test_targets() -> None:
    assert set(TARGETS) == {"dense", "peft", "compressed-tensors", "gguf"}
    assert all(dataclasses.is_dataclass(target.config) for target in TARGETS.values())
    with pytest.raises(ValueError, match="'dense' is registered already"):
        register("dense", DenseExport, TARGETS["dense"].write)


def test_never_over_something(split, tiny_llama, tmp_path: Path) -> None:
    model = split(tiny_llama())
    save_split(model, tmp_path / "split")
    before = {p: p.read_bytes() for p in (tmp_path / "split").iterdir()}
    (tmp_path / "file").write_text("x")
    for place in ("split", "file"):
        with pytest.raises(FileExistsError, match=f"{place} is there already"):
            export_split(model, tmp_path / place, DenseExport())
    assert before == {p: p.read_bytes() for p in (tmp_path / "split").iterdir()}
    with pytest.raises(NotADirectoryError, match="is a file"):
        export_split(model, tmp_path / "file" / "out", DenseExport())
    (tmp_path / "empty").mkdir()
    export_split(model, tmp_path / "empty", DenseExport())
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_export_says_of_which_split_it_is(split, tiny_llama, tmp_path: Path) -> None:
    model, other = split(tiny_llama()), split(tiny_llama(), targets=("down_proj",))
    save_split(model, tmp_path / "split")
    save_split(other, tmp_path / "other")
    strip(tmp_path / "split", tmp_path / "base")
    loaded = load_split(tmp_path / "split", dtype=torch.bfloat16)
    for number, (made, alphas) in enumerate([(model, (1.0,)), (loaded, (1.0,)), (loaded, ())]):
        out = tmp_path / f"export-{number}"
        report = export_split(made, out, PeftExport(alphas=alphas))
        assert report.streams_sha256 == read_manifest(tmp_path / "split").streams_sha256
        check_made_from(out, tmp_path / "split")
        check_made_from(out, tmp_path / "base")
        with pytest.raises(ValueError, match=r"those of .*other have .* not of one split"):
            check_made_from(out, tmp_path / "other")
    (out / "libortho_export.json").unlink()
    with pytest.raises(ValueError, match=r"does not say which split .* export again"):
        check_made_from(out, tmp_path / "split")


def test_all_or_nothing(split, tiny_llama, tmp_path: Path, monkeypatch) -> None:
    def fails(model, folder, config, tokenizer):
        (folder / "half").write_text("written")
        raise OSError("no space left on device")

    monkeypatch.setitem(TARGETS, "dense", Target("dense", DenseExport, fails))
    with pytest.raises(OSError, match="no space left"):
        export_split(split(tiny_llama()), tmp_path / "out", DenseExport())
    assert list(tmp_path.iterdir()) == []


def test_what_it_is_given(split, tiny_llama, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no OrthoLinear layer"):
        export_split(tiny_llama(), tmp_path / "out", DenseExport())
    with pytest.raises(TypeError, match=r"dict configures no export: expected one of .*DenseExpor"):
        export_split(split(tiny_llama()), tmp_path / "out", {})
    layer = split(tiny_llama()).model.layers[0].mlp.down_proj
    with pytest.raises(TypeError, match="model is a OrthoLinear: expected a transformers model"):
        export_split(layer, tmp_path / "out", DenseExport())
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_there(split, tiny_llama, tmp_path: Path, monkeypatch) -> None:
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    model = split(tiny_llama())  # transformers imports by the same function
    monkeypatch.setattr(registry.importlib, "import_module", missing)
    said = r"needs the package 'peft'.*pip install '\.\[export\]'"
    with pytest.raises(LibOrthoError, match=said):
        export_split(model, tmp_path / "out", PeftExport())
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_broken(monkeypatch) -> None:
    def broken(name: str):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(registry.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="other"):
        registry.require("peft", "a test")
