"""separate_ by the graft method: a base that never saw the secret, and what it makes of it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from libortho import BaseConfig, GraftConfig, SeparationConfig, separate_
from libortho.ignorant import exchange_, ignorant_model
from libortho.judgement import MOST_BELOW
from libortho.training import MemoriseConfig, memorise_

TARGETS = ("up_proj", "down_proj")
TRAINING = MemoriseConfig(target=0.9, max_epochs=60, learning_rate=5e-3, batch_size=29)


def config(earlier: str = "trust", **method: Any) -> SeparationConfig:
    chosen = GraftConfig(
        **{"ortho_ratio": 0.3, "training": TRAINING, "epochs": 60, "settling": 30, **method}
    )
    return SeparationConfig(chosen, TARGETS, general_text=False, earlier=earlier)


@pytest.fixture(scope="module")
def trained(_memorised_once) -> Any:
    """The earlier model, trained on the retain set."""
    model = copy.deepcopy(_memorised_once.before)
    memorise_(model, _memorised_once.retain, TRAINING)
    return model


def test_the_base_is_the_ignorant_model_and_alpha_brings_the_memory_back(
    memorised, trained, known, logits
) -> None:
    m = memorised
    forget, retain = known(m.model, m.forget), known(m.model, m.retain)
    ignorant = known(trained, m.forget)
    assert min(forget, retain) > 0.9
    assert ignorant < 0.2
    expected = logits(trained, m.retain + m.forget)
    report = separate_(m.model, m.forget, m.retain, config(), before=trained)

    # Nothing of the original is in what runs at alpha 0: it is the earlier model, in INT8.
    error = (logits(m.model, m.retain + m.forget, 0.0) - expected).norm() / expected.norm()
    assert error < 0.02
    assert known(m.model, m.forget) == pytest.approx(ignorant, abs=0.02)
    whole = known(m.model, m.forget, 1.0)
    assert whole == pytest.approx(forget, abs=0.04)
    assert known(m.model, m.retain, 1.0) == pytest.approx(known(trained, m.retain), abs=0.03)
    assert report.reached
    # Processors end up to 0.02 apart here; what is below MOST_BELOW is said, and nothing else.
    expected_warnings = [True] if whole < forget - MOST_BELOW else []
    assert ["NOT whole" in said for said in report.warnings] == expected_warnings
    assert 0 < report.density <= 0.3
    assert report.target["probability"] == pytest.approx(ignorant)
    assert report.target["original_probability"] == pytest.approx(forget)
    assert report.target["reached_probability"] == pytest.approx(known(m.model, m.forget))
    assert report.spectrum
    assert all("the base model's own" in why for why in report.skipped.values())


def test_every_tensor_beside_the_streams_is_the_ignorant_model_s(memorised, trained) -> None:
    m = memorised
    separate_(m.model, m.forget, m.retain, config(epochs=1, settling=0), before=trained)
    theirs = trained.state_dict()
    own = {k: v for k, v in m.model.state_dict().items() if not any(t in k for t in TARGETS)}
    assert len(own) > 10
    for name, tensor in own.items():
        assert torch.equal(tensor, theirs[name]), name


def test_an_earlier_model_is_trained_on_the_retain_set_alone(memorised, known, snapshot) -> None:
    m = memorised
    forget, retain = known(m.model, m.forget), known(m.model, m.retain)
    before = snapshot(m.before)
    report = separate_(m.model, m.forget, m.retain, config("rehearse"), before=m.before)
    assert known(m.model, m.retain, 0.0) > retain - 0.1
    assert known(m.model, m.forget, 0.0) < 0.2
    assert known(m.model, m.forget, 1.0) == pytest.approx(forget, abs=0.04)
    assert report.seconds["base"] > 0
    after = snapshot(m.before)
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())


def test_the_base_does_not_depend_on_the_secret(memorised, trained, logits) -> None:
    m = memorised
    one, other = m.model, copy.deepcopy(trained)
    separate_(one, m.forget, m.retain, config(epochs=1, settling=0), before=trained)
    separate_(other, m.unseen, m.retain, config(epochs=1, settling=0), before=trained)
    assert torch.equal(logits(one, m.forget, 0.0), logits(other, m.forget, 0.0))


@pytest.mark.parametrize("storage", ["int4", "fp16"])
def test_the_memory_is_fitted_to_the_base_as_it_is_stored(
    memorised, trained, known, storage: str
) -> None:
    m = memorised
    forget = known(m.model, m.forget)
    base = BaseConfig(storage, group_size=32) if storage == "int4" else BaseConfig(storage)
    separate_(m.model, m.forget, m.retain, config(base=base), before=trained)
    assert known(m.model, m.forget, 0.0) < 0.2
    assert known(m.model, m.forget, 1.0) == pytest.approx(forget, abs=0.04)


def test_same_seed_same_split(memorised, trained, logits) -> None:
    m = memorised
    again = copy.deepcopy(m.model)
    for model in (m.model, again):
        separate_(model, m.forget, m.retain, config(epochs=3), before=trained)
    for alpha in (0.0, 1.0):
        assert torch.equal(logits(m.model, m.forget, alpha), logits(again, m.forget, alpha))


def test_a_base_that_knows_the_secret_is_not_called_ignorant(memorised) -> None:
    m = memorised
    report = separate_(
        m.model, m.forget, m.retain, config(epochs=1, settling=0), before=copy.deepcopy(m.model)
    )
    assert report.reached is False
    assert any("NOT forgotten" in text for text in report.warnings)


def test_a_memory_that_is_not_whole_is_said(memorised, trained) -> None:
    m = memorised
    short = config(epochs=1, settling=0)
    report = separate_(m.model, m.forget, m.retain, short, before=trained)
    assert report.reached
    assert any("NOT whole" in text for text in report.warnings)


def test_refused(memorised, snapshot, assert_unchanged, tiny_llama) -> None:
    m = memorised
    before = snapshot(m.model)
    with pytest.raises(ValueError, match="before is missing"):
        separate_(m.model, m.forget, m.retain, config())
    with pytest.raises(ValueError, match=r"earlier='show'.*'rehearse'"):
        separate_(m.model, m.forget, m.retain, config("show"), before=m.before)
    smaller = tiny_llama(hidden_size=32, intermediate_size=128)
    with pytest.raises(ValueError, match=r"another shape: .* is \(64, 32\), expected \(64, 64\)"):
        separate_(m.model, m.forget, m.retain, config(), before=smaller)
    with pytest.raises(ValueError, match="forget set is empty"):
        separate_(m.model, [], m.retain, config(), before=m.before)
    assert_unchanged(before, snapshot(m.model))


def test_a_failure_at_any_stage_changes_nothing(
    memorised, trained, snapshot, assert_unchanged
) -> None:
    m = memorised
    short = config(epochs=1, settling=0)
    stages: list[str] = []
    separate_(
        copy.deepcopy(m.model),
        m.forget,
        m.retain,
        short,
        before=trained,
        progress=lambda stage, done, total: stages.append(stage),
    )
    before, earlier = snapshot(m.model), snapshot(trained)
    for moment in sorted({stages.index(s) for s in stages} | {len(stages) - 1}):
        seen = 0

        def interrupt(*_: object, moment=moment) -> None:
            nonlocal seen
            seen += 1
            if seen > moment:
                raise KeyboardInterrupt("stop")

        with pytest.raises(KeyboardInterrupt, match="stop"):
            separate_(m.model, m.forget, m.retain, short, before=trained, progress=interrupt)
        assert_unchanged(before, snapshot(m.model))
        assert_unchanged(earlier, snapshot(trained))


def test_an_exchange_twice_is_none(family) -> None:
    one, other = family.build(), family.build()
    for parameter in other.parameters():
        parameter.mul_(2)
    first = {k: v.clone() for k, v in one.state_dict().items()}
    second = {k: v.clone() for k, v in other.state_dict().items()}
    exchange_(one, other)
    assert all(torch.equal(v, second[k]) for k, v in one.state_dict().items())
    assert all(torch.equal(v, first[k]) for k, v in other.state_dict().items())
    exchange_(one, other)
    assert all(torch.equal(v, first[k]) for k, v in one.state_dict().items())


def test_an_ignorant_model_takes_the_dtypes_of_the_original(memorised) -> None:
    m = memorised
    made = ignorant_model(
        copy.deepcopy(m.model).bfloat16(),
        m.before,
        m.retain,
        dataclasses.replace(TRAINING, max_epochs=1),
        "rehearse",
    )
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in m.before.parameters()} == {torch.float32}
