"""OpenUnlearning's two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libortho.evaluation.entries import write_openunlearning


def test_files_are_openunlearnings(evaluation, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "alpha 0"
    write_openunlearning(evaluation.logs, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["TOFU_EVAL.json", "TOFU_SUMMARY.json"]
    text = (folder / "TOFU_EVAL.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(evaluation.logs))
    assert list(json.loads(text)) == sorted(evaluation.logs)
    assert '\n    "exact_memorization": {\n        "agg_value"' in text
    summary = json.loads((folder / "TOFU_SUMMARY.json").read_text())
    assert summary == {k: v["agg_value"] for k, v in sorted(evaluation.logs.items())}
    write_openunlearning({"x": {"agg_value": None}, "a": {"agg_value": 1.0}}, folder)
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text()) == {"a": 1.0}
    with pytest.raises(TypeError):
        write_openunlearning({"x": {"agg_value": object()}}, folder)
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text()) == {"a": 1.0}  # still whole
    assert len(list(folder.iterdir())) == 2
