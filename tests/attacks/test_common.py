"""Subjects: an attacker's dense copy says what the split says, and is a copy."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from libortho.alpha import set_alpha
from libortho.attacks import AttackData, Score, Subject
from libortho.attacks.common import dense_copy, mean_score, weight_of
from libortho.errors import OrthoStreamMissing
from libortho.layer import OrthoLinear, replace_linear_layers


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_dense_copy_says_the_same(family, large_ortho, alpha: float) -> None:
    model = replace_linear_layers(family.build(), [family.mlp], ratio=0.1)
    large_ortho(model)
    set_alpha(model, alpha)
    ids = torch.randint(3, 60, (2, 9))
    expected = model(input_ids=ids, use_cache=False).logits
    dense = dense_copy(model)
    assert not any(isinstance(m, OrthoLinear) for m in dense.modules())
    assert not any(p.requires_grad for p in dense.parameters())
    torch.testing.assert_close(
        dense(input_ids=ids, use_cache=False).logits, expected, atol=2e-4, rtol=2e-4
    )
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_an_alpha_for_each_row_has_no_dense_form(tiny_llama) -> None:
    model = replace_linear_layers(tiny_llama(), ["down_proj"], ratio=0.1)
    set_alpha(model, [0.0, 1.0])
    with pytest.raises(ValueError, match="an alpha for each row"):
        dense_copy(model)


def test_weights_are_as_they_run(families) -> None:
    family = families["gpt2"]
    model = family.build()
    name = "transformer.h.0.mlp.c_proj"
    before = weight_of(model.get_submodule(name), name)
    assert torch.equal(before, model.get_submodule(name).weight.T)
    before.zero_()
    assert model.get_submodule(name).weight.any()  # it was a copy
    replace_linear_layers(model, [family.mlp], ratio=0.1)
    layer = model.get_submodule(name)
    set_alpha(model, 0.5)
    assert torch.equal(weight_of(layer, name), layer.effective_weight(0.5))


def test_a_subject_is_loaded_at_its_alpha(world, subjects) -> None:
    for name, alpha in (("alpha 0", 0.0), ("alpha 1", 1.0)):
        layer = subjects[name].model.get_submodule(subjects[name].layers[0])
        assert layer.default_alpha.rows == (alpha,)
    with pytest.raises(ValueError, match=r"toy has no layer nowhere"):
        Subject.load("toy", str(world.reference), ["nowhere"])


def test_a_base_alone_has_no_alpha_1(world, tmp_path) -> None:
    from libortho.checkpoint import strip

    strip(world.split, tmp_path / "base")
    Subject.load("base", str(tmp_path / "base"), [])
    with pytest.raises(OrthoStreamMissing):
        Subject.load("base", str(tmp_path / "base"), [], alpha=1.0)


def test_a_score_survives_json() -> None:
    score = mean_score("a", "b", [0.0, 1.0, 1.0], 0.5, {"curve": [[0, 1.0]]})
    assert score.value == pytest.approx(2 / 3)
    assert score.standard_error == pytest.approx((1 / 9) ** 0.5)
    held = json.loads(json.dumps(score.to_dict()))
    assert Score.from_dict(held) == score
    assert Score("a", "b", 1.0).standard_error is None


def test_records_are_needed(data: AttackData) -> None:
    for name in ("forget", "retain"):
        with pytest.raises(ValueError, match=f"the {name} set is empty"):
            dataclasses.replace(data, **{name: ()})
    dataclasses.replace(data, holdout=())
