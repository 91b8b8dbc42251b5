"""The manifest: anything unknown, missing or contradictory in it is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libortho import CheckpointError
from libortho.checkpoint import is_split, load_split, read_manifest


def test_is_split(saved: Path, tmp_path: Path) -> None:
    assert is_split(saved)
    assert is_split(str(saved))
    assert not is_split(tmp_path)
    assert not is_split(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("no JSON")
    assert not is_split(tmp_path)


LAYER = "model.layers.0.mlp.down_proj"


def entry(plain: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = plain["layers"][LAYER]
    return result


MANIFEST_ERRORS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(format_version=2), "format_version=2: this version of libortho reads 1"),
    (lambda m: m.update(format_version=True), "format_version=True"),
    (lambda m: m.pop("format_version"), "format_version=None"),
    (lambda m: m.update(surprise=1), "unknown key 'quantization_config.surprise'"),
    (lambda m: entry(m).update(surprise=1), f"layers.{LAYER}.surprise'"),
    (lambda m: m.pop("base_sha256"), "base_sha256' is missing"),
    (lambda m: m.update(base_sha256="abc"), "64 hexadecimal digits"),
    (lambda m: m.update(base_sha256="A" * 64), "lower case"),
    (lambda m: m.update(streams_sha256="0" * 63), "streams_sha256='000.*64 hexadecimal digits"),
    (lambda m: m.update(streams_sha256="0" * 64), "the base is damaged"),
    (lambda m: m.update(base_sha256=7), "base_sha256=7: expected str"),
    (lambda m: m.update(layers={}), "layers is empty"),
    (lambda m: m.update(layers=[]), r"layers=\[\]: expected dict"),
    (lambda m: m["layers"].update({LAYER: 3}), "is 3: expected an object"),
    (lambda m: entry(m).update(shape=[24]), r"shape=\[24\]"),
    (lambda m: entry(m).update(shape=[24, 40.0]), r"shape\[1\]=40.0: expected int"),
    (lambda m: entry(m).update(shape=[24, 0]), "above 0"),
    (lambda m: entry(m).update(shape=[25, 40]), r"base.qdata is \[24, 40\]: expected \[25, 40\]"),
    (lambda m: entry(m).update(base="int3"), "base='int3': expected Literal"),
    (lambda m: entry(m).update(base="fp16"), "base.scale does not belong"),
    (lambda m: m["layers"].pop(LAYER), "no such layer is split"),
    (lambda m: m["tied"].update(a="b"), "tied.a='b'"),
    (lambda m: m["tied"].update({"lm_head.weight": "lm_head.weight"}), "expected the name of a"),
    (lambda m: m["buffer_dtypes"].update(x="int8"), "buffer_dtypes.x='int8'"),
]


ORTHO_ERRORS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(quant_method="pickle"), "quant_method='libortho'"),
    (lambda m: m.update(format_version=2), "format_version=2: this version of libortho reads 1"),
    (lambda m: m.update(surprise=1), "unknown key 'surprise'"),
    (lambda m: m.pop("layers"), "'layers' is missing"),
    (lambda m: m.update(layers={}), "layers is empty"),
    (lambda m: m["layers"].update({LAYER: "dense"}), "='dense': expected Literal"),
    (lambda m: m["layers"].update({LAYER: "low_rank"}), "ortho.left is missing"),
    (lambda m: m["layers"].update({"lm_head": "sparse"}), "layers.lm_head: no such layer is split"),
    (lambda m: m["layers"].pop(LAYER), "is unexpected"),
    (lambda m: m.update(ortho_sha256="0" * 64), "the ortho is damaged"),
    (lambda m: m.update(base_sha256="0" * 64), "made for the base"),
]


@pytest.mark.usefixtures("forbid_use")
@pytest.mark.parametrize(
    ("which", "change", "match"),
    [("base", *case) for case in MANIFEST_ERRORS] + [("ortho", *case) for case in ORTHO_ERRORS],
)
def test_a_wrong_manifest(
    edit, which: str, change: Callable[[dict[str, Any]], Any], match: str, copy: Path
) -> None:
    edit(copy, change, which)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_split(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["ortho_config.json", "ortho.safetensors"])
def test_half_an_ortho_is_refused(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing.*half an ortho"):
        load_split(copy)


def test_another_quant_method_is_no_split(edit, copy: Path) -> None:
    edit(copy, lambda plain: plain.update(quant_method="gptq"))
    assert not is_split(copy)
    with pytest.raises(CheckpointError, match="is a model, and no split of one"):
        load_split(copy)


def test_the_format_before_the_first_release_is_refused(copy: Path) -> None:
    (copy / "libortho.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"before the first release.*make the split again"):
        load_split(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"quantization_config": 1}'])
@pytest.mark.parametrize("name", ["config.json", "ortho_config.json"])
def test_a_manifest_that_is_no_object(name: str, text: str, copy: Path) -> None:
    (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        load_split(copy)


def test_a_manifest_that_is_no_text(copy: Path) -> None:
    (copy / "config.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_manifest(copy)
