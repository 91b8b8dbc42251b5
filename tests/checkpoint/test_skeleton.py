"""The model built from a config: it must fit the tensors, and it runs no code of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from libortho import CheckpointError
from libortho.checkpoint import load_split, verify_split


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 48}, r"Linear of shape \(48, 40\): expected .* \(24, 40\)"),
        ({"vocab_size": 62}, r"lm_head.weight is \[61, 24\], the config's model has \[62"),
        ({"num_hidden_layers": 3}, "is missing: the config's model has it"),
        ({"num_hidden_layers": 1}, "down_proj is missing|is unexpected"),
        ({"intermediate_size": 41}, r"of shape \(24, 41\)"),
        ({"model_type": "no_such_model"}, "config"),
        ({"hidden_size": "wide"}, "config"),
        ({"vocab_size": -14}, "no causal LM can be built from it"),
        # Still fits: nothing but the digest tells that this is another model.
        ({"rms_norm_eps": 1e-3}, "it was changed after it was saved"),
    ],
)
def test_a_config_that_is_not_of_these_tensors(
    change: dict[str, Any], match: str, copy: Path
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match) as caught:
        load_split(copy)
    assert "config.json" in str(caught.value)


def test_a_config_that_is_written_another_way(edit, copy: Path) -> None:
    path = copy / "config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(plain.items())), indent=7))
    verify_split(copy)
    load_split(copy)
    path.write_text(json.dumps(plain | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"config\.json: .* changed after it was saved"):
        verify_split(copy)
    # As it was written before there was a digest of it.
    edit(copy, lambda section: section.pop("config_sha256"))
    verify_split(copy)
    load_split(copy)


@pytest.mark.parametrize("text", ["", "{", "[]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_json(name: str, text: str, copy: Path) -> None:
    (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        load_split(copy)


def test_a_config_cannot_bring_code(copy: Path) -> None:
    path = copy / "config.json"
    code = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (copy / "code.py").write_text("raise SystemExit('code from a checkpoint was run')")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_split(copy)
