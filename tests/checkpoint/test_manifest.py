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


LAYER = "model.layers.0.mlp.down_proj"


def entry(plain: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = plain["layers"][LAYER]
    return result


MANIFEST_ERRORS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(format="pickle"), "format='libortho-split'"),
    (lambda m: m.update(format_version=2), "format_version=2: this version of libortho reads 1"),
    (lambda m: m.update(format_version=True), "format_version=True"),
    (lambda m: m.pop("format_version"), "format_version=None"),
    (lambda m: m.update(surprise=1), "unknown key 'surprise'"),
    (lambda m: entry(m).update(surprise=1), f"unknown key 'layers.{LAYER}.surprise'"),
    (lambda m: entry(m)["report"].update(x=1), f"unknown key 'layers.{LAYER}.report.x'"),
    (lambda m: entry(m)["report"].update(rank=1.5), r"report.rank=1.5: expected int"),
    (lambda m: entry(m)["report"].update(seconds="long"), "report.seconds='long': expected float"),
    (lambda m: m.pop("base_sha256"), "key 'base_sha256' is missing"),
    (lambda m: m.update(base_sha256="abc"), "64 hexadecimal digits"),
    (lambda m: m.update(base_sha256=7), "base_sha256=7: expected str"),
    (lambda m: m.update(ortho_sha256=None), "one is there, one is not"),
    (lambda m: m.update(layers={}), "layers is empty"),
    (lambda m: m.update(layers=[]), r"layers=\[\]: expected dict"),
    (lambda m: m["layers"].update({LAYER: 3}), "is 3: expected an object"),
    (lambda m: entry(m).update(shape=[24]), r"shape=\[24\]"),
    (lambda m: entry(m).update(shape=[24, 40.0]), r"shape\[1\]=40.0: expected int"),
    (lambda m: entry(m).update(shape=[24, 0]), "above 0"),
    (lambda m: entry(m).update(shape=[25, 40]), r"base.qdata is \[24, 40\]: expected \[25, 40\]"),
    (lambda m: entry(m).update(base="int3"), "base='int3': expected Literal"),
    (lambda m: entry(m).update(base="fp16"), "base.scale does not belong"),
    (lambda m: entry(m).update(ortho="dense"), "ortho='dense'"),
    (lambda m: entry(m).update(ortho="low_rank"), "ortho.left is missing"),
    (lambda m: m["tensors"].pop("lm_head.weight"), "lm_head.weight is unexpected"),
    (lambda m: m["tensors"]["lm_head.weight"].update(dtype="F16"), r"F32 \[61, 24\].*says F16"),
    (lambda m: m["tensors"]["lm_head.weight"].update(shape=[1]), r"F32 \[61, 24\].*says F32 \[1\]"),
    (lambda m: m["tied"].update(a="b"), "tied.a='b'"),
    (lambda m: m["buffer_dtypes"].update(x="int8"), "buffer_dtypes.x='int8'"),
    (lambda m: m["files"].append("../secrets"), "inside the folder"),
    (lambda m: m["files"].append("/etc/passwd"), "inside the folder"),
    (lambda m: m["files"].append("sub/ortho.safetensors"), "not listed there"),
]


@pytest.mark.usefixtures("forbid_building")
@pytest.mark.parametrize(("change", "match"), MANIFEST_ERRORS)
def test_a_wrong_manifest(
    edit,
    change: Callable[[dict[str, Any]], Any],
    match: str,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_split(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"format": "libortho-split"'])
def test_a_manifest_that_is_no_object(text: str, copy: Path) -> None:
    (copy / "libortho.json").write_text(text)
    for read in (read_manifest, load_split):
        with pytest.raises(CheckpointError, match=r"libortho\.json"):
            read(copy)


def test_a_manifest_that_is_no_text(copy: Path) -> None:
    (copy / "libortho.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_manifest(copy)
