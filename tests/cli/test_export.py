"""`libortho export`, from the outside: what is written, what is said, and what is refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from libortho import OrthoLinear
from libortho.base import quantize
from libortho.checkpoint import OrthoKey, encrypt_split, save_split
from libortho.cli import app
from libortho.linear import install, read_linear, select_linear
from libortho.ortho import LowRankOrtho


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama, tokenizer) -> Path:
    """A split checkpoint whose first layer has an empty ortho stream."""
    model = tiny_llama()
    new = {}
    for rank, (name, module) in enumerate(select_linear(model, "down_proj").items()):
        weight, bias = read_linear(module, name)
        left, right = torch.randn(weight.shape[0], rank), torch.randn(rank, weight.shape[1])
        ortho = LowRankOrtho.from_factors(left, right, torch.float16)
        new[name] = OrthoLinear.from_streams(quantize(weight), ortho, bias)
    install(model, new)
    save_split(model, tmp_path / "split", tokenizer=tokenizer)
    return tmp_path / "split"


@pytest.fixture
def export(checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    """`export(options...)` into `out`."""

    def run(*options: object, out: str = "out"):
        words = ["export", checkpoint, "--out", tmp_path / out, *options]
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


def test_peft(export, tmp_path: Path) -> None:
    made = export("--to", "peft", "--alphas", "0.25,0.5", "--json", tmp_path / "report.json")
    assert made.exit_code == 0, made.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["adapters"] == {"ortho": 1.0, "ortho-0.25": 0.25, "ortho-0.5": 0.5}
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"base", *report["adapters"]}
    assert (out / "base" / "tokenizer.json").is_file()
    said = " ".join(made.output.split())
    assert "model.layers.0.mlp.down_proj" in said  # the empty one is named
    assert "alpha 0.25, holds the memory" in said
    assert "largest LoRA rank: 1" in said
    assert "max_loras" in said


def test_dense_and_compressed_tensors(export, tmp_path: Path) -> None:
    for alpha in ((), ("--alpha", 0.5)):
        made = export("--to", "dense", *alpha, out=f"dense{len(alpha)}")
        assert made.exit_code == 0, made.output
        assert ("the memory is in these files, at alpha 0.5" in made.output) is bool(alpha)
    made = export("--to", "compressed-tensors", "--activations", "int8", "--base-only")
    assert made.exit_code == 0, made.output
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["base"]
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"


def test_a_checkpoint_without_its_memory(export, checkpoint: Path) -> None:
    (checkpoint / "ortho.safetensors").unlink()
    (checkpoint / "ortho_config.json").unlink()
    for target in ("peft", "compressed-tensors"):
        refused = export("--to", target)
        assert refused.exit_code == 2
        assert "no ortho stream" in refused.output
        assert export("--to", target, "--base-only", out=target).exit_code == 0
    refused = export("--to", "dense", "--alpha", 1)
    assert refused.exit_code == 2
    assert "model.layers.0.mlp.down_proj has no ortho stream" in refused.output
    assert export("--to", "dense", out="dense").exit_code == 0


def test_the_base_of_a_locked_split_needs_no_key(export, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    assert export("--to", "dense", out="before").exit_code == 0
    encrypt_split(checkpoint, OrthoKey(bytes(range(32))))
    made = export("--to", "dense", out="after")
    assert made.exit_code == 0, made.output
    before, after = (tmp_path / x / "model.safetensors" for x in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()
    assert export("--to", "peft", "--base-only", out="peft").exit_code == 0
    refused = export("--to", "dense", "--alpha", 0.5, out="more")
    assert refused.exit_code == 2
    assert "is locked" in " ".join(refused.output.split())


def test_only_what_holds_the_memory_is_its_owners_alone(export, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        for number, options in enumerate(
            (["dense"], ["dense", "--alpha", 1], ["peft"], ["compressed-tensors"])
        ):
            made = export("--to", *options, out=str(number))
            assert made.exit_code == 0, made.output
    finally:
        os.umask(umask)
    modes = {
        path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for number in range(4)
        for path in (tmp_path / str(number)).rglob("*.safetensors")
    }
    assert modes == {
        "0/model.safetensors": 0o644,
        "1/model.safetensors": 0o600,
        "2/base/model.safetensors": 0o644,
        "2/ortho/adapter_model.safetensors": 0o600,
        "3/base/model.safetensors": 0o644,
        "3/ortho/adapter_model.safetensors": 0o600,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "onnx"), "--to 'onnx': expected one of compressed-tensors, dense, gguf, peft"),
        (("--to", "peft", "--alpha", "0.5"), "--alpha says nothing to --to peft"),
        (("--to", "dense", "--alphas", "0.5"), "--alphas says nothing to --to dense"),
        (("--to", "dense", "--base-only"), "--base-only says nothing to --to dense"),
        (("--to", "peft", "--storage", "f16"), "--storage says nothing to --to peft"),
        (("--to", "peft", "--alphas", "0.5", "--base-only"), "expected one of them"),
        (("--to", "peft", "--alphas", "0"), "alphas=0.0"),
        (("--to", "peft", "--dtype", "int8"), "dtype='int8'"),
        (("--to", "gguf", "--alphas", "0.5"), "scales an adapter per request"),
        (("--to", "gguf"), "a WordLevel tokenizer"),
    ],
)
def test_what_is_wrong_is_said(options, message, export, tmp_path: Path) -> None:
    refused = export(*options)
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(export, checkpoint: Path) -> None:
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    refused = export("--to", "dense", out="split")
    assert refused.exit_code == 2
    assert "is there already" in refused.output
    assert before == {path: path.read_bytes() for path in checkpoint.iterdir()}
