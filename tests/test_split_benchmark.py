"""benchmarks/split.py in its quick form, on tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_modules import load_benchmark


@pytest.fixture
def split(monkeypatch) -> ModuleType:
    return load_benchmark("split", monkeypatch)


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_exponent(split: ModuleType, power: float) -> None:
    sizes = [1, 10, 100, 1000, 10_000]
    # The small sizes are all overhead; they are not fitted.
    seconds = [7.0, 7.0, *(3e-4 * size**power for size in sizes[2:])]
    assert split.exponent(sizes, seconds) == pytest.approx(power)


def test_quick_form(split: ModuleType, tiny_llama, tokenizer, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(split, "SIZES", {True: (16, 32, 48)})
    monkeypatch.setattr(split, "TOKENS", {True: (1024, 2048, 3072)})
    out = {name: tmp_path / name for name in ("split.json", "bars.json", "split.png")}
    arguments = ["--quick", "--shape", "64", "2048", "--tokens", "500"]
    arguments += ["--model", str(folder), "--plot", str(out["split.png"])]
    arguments += ["--json", str(out["split.json"]), "--bars", str(out["bars.json"])]
    status = split.main(arguments)
    found = json.loads(out["split.json"].read_text())
    assert [set(bar) for bar in found["bars"]] == [{"bar", "value", "required", "holds"}] * 6
    assert status == (0 if all(bar["holds"] for bar in found["bars"]) else 1)
    kept = json.loads(out["bars.json"].read_text())
    assert [bar["bar"] for bar in kept] == [f"split: {bar['bar']}" for bar in found["bars"]]
    assert [layer["way"] for layer in found["layers"]] == ["spectral", "geometric"]
    geometric = found["layers"][1]
    assert set(geometric["seconds"]) == set(geometric["processor_seconds"])
    assert set(geometric["seconds"]) == {"statistics", "factor", "project", "quantise"}
    assert geometric["extra_bytes"] > 4 * 2048**2  # the moment is part of the peak
    assert geometric["weight_bytes"] == 2 * 64 * 2048
    assert found["model"]["tokens"] >= 500
    assert found["model"]["solve"]["projection"]["solve"] > 0
    assert {name.split(":")[0] for name in found["growth"]} == {"width", "tokens", "layers"}
    assert out["split.png"].read_bytes().startswith(b"\x89PNG")
