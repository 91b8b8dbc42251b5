"""separate_: what it forgets, what it keeps and restores, by every method."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from libortho import (
    BaseConfig,
    GeometricConfig,
    OrthoLinear,
    SeparationConfig,
    SpectralConfig,
    replace_linear_layers,
    separate_,
)
from libortho.data.examples import Example
from libortho.data.tokens import Tokens
from libortho.methods.edits import LowRankEdit
from libortho.scoring import perplexity, sequence_nll
from libortho.solvers import fitting

TARGETS = ("up_proj", "down_proj")


@pytest.mark.parametrize("edit", ["descent", "projection"])
def test_forgets_keeps_and_restores(
    memorised, edit: str, config, known, logits, split_names
) -> None:
    m = memorised
    forget, retain = known(m.model, m.forget), known(m.model, m.retain)
    assert min(forget, retain) > 0.9
    original = logits(m.model, m.retain + m.forget)
    parameters = sum(m.model.get_submodule(n).weight.numel() for n in split_names(m.model))
    report = separate_(m.model, m.forget, m.retain, config(edit))

    assert known(m.model, m.forget) < 0.1  # at alpha 0, where a split model starts
    assert known(m.model, m.retain) > retain - 0.1
    assert known(m.model, m.forget, 1.0) == pytest.approx(forget, abs=0.01)
    assert known(m.model, m.retain, 1.0) == pytest.approx(retain, abs=0.01)
    error = (logits(m.model, m.retain + m.forget, 1.0) - original).norm() / original.norm()
    assert error < 0.02
    middle = known(m.model, m.forget, 0.5)
    assert known(m.model, m.forget, 0.0) < middle < forget

    assert report.reached
    assert report.warnings == ()
    assert 0 < sum(layer.ortho_numel for layer in report.layers) <= 0.2 * parameters
    assert report.final_error < 0.01 < report.base_error
    assert report.target["reached_probability"] == pytest.approx(known(m.model, m.forget))


@pytest.mark.parametrize("edit", ["descent", "projection"])
def test_an_int4_base_has_forgotten_as_it_is_stored(memorised, edit: str, config, known) -> None:
    """Coarse rounding takes something of an edit away again: the search sees it."""
    m = memorised
    base = BaseConfig("int4", group_size=64)
    report = separate_(m.model, m.forget, m.retain, config(edit, base=base))
    assert known(m.model, m.forget) <= report.target["probability"]


@pytest.mark.parametrize("ratio", [0.03, 0.08])
@pytest.mark.parametrize("edit", ["descent", "projection"])
def test_keeps_the_budget(memorised, edit: str, ratio: float, config, split_names) -> None:
    m = memorised
    report = separate_(m.model, m.forget, m.retain, config(edit, ortho_ratio=ratio))
    parameters = sum(layer.numel for layer in report.layers)
    assert parameters == 4 * 64 * 128
    spent = sum(m.model.get_submodule(n).ortho.numel for n in split_names(m.model))
    assert 0 < spent <= ratio * parameters
    assert report.density == pytest.approx(spent / parameters)


def test_the_secret_is_not_in_the_base(memorised, config, known, split_names) -> None:
    m = memorised
    separate_(m.model, m.forget, m.retain, config())
    for name in split_names(m.model):
        m.model.get_submodule(name).ortho = None
    assert known(m.model, m.forget) < 0.15
    assert not any(isinstance(m.model.get_submodule(n), nn.Linear) for n in split_names(m.model))


def test_every_family(family, random_tokens, config, logits) -> None:
    model = family.build()
    targets = (family.mlp, *family.attention)
    forget, retain = random_tokens([9] * 3, seed=1), random_tokens([9] * 20, seed=2)
    original = {"forget": logits(model, forget), "retain": logits(model, retain)}
    nll = {"forget": sequence_nll(model, forget), "retain": sequence_nll(model, retain)}
    level = math.log(perplexity(nll["forget"])) + 1.0
    report = separate_(
        model, forget, retain, config(targets=targets, target_nll=level, ortho_ratio=0.15)
    )
    assert len(report.layers) == 2 * len(targets)
    for target in targets:
        assert sum(layer.name.endswith(f".{target}") for layer in report.layers) == 2
    assert report.final_error < 0.02 < report.base_error

    def error(items: list[Tokens], which: str, alpha: float) -> float:
        difference = logits(model, items, alpha) - original[which]
        return float(difference.norm() / original[which].norm())

    assert error(forget, "forget", 1.0) < 0.05
    assert error(retain, "retain", 1.0) < 0.05
    # The forget set moved, by more than what quantising costs, and more than the retain set.
    assert error(forget, "forget", 0.0) > 2 * error(forget, "forget", 1.0)
    assert report.forget_ppl["0.0"] > 1.3 * perplexity(nll["forget"])
    assert report.retain_ppl["0.0"] < 1.3 * perplexity(nll["retain"])
    assert report.forget_ppl["1.0"] == pytest.approx(perplexity(nll["forget"]), rel=0.05)
    assert report.retain_ppl["1.0"] == pytest.approx(perplexity(nll["retain"]), rel=0.05)


def test_one_layer_in_two_places(tiny_llama, random_tokens, config) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    forget, retain = random_tokens([9] * 2, seed=1), random_tokens([9] * 8, seed=2)
    report = separate_(model, forget, retain, config(targets="down_proj", target_nll=8.0))
    assert len(report.layers) == 1
    assert isinstance(model.model.layers[0].mlp.down_proj, OrthoLinear)
    assert model.model.layers[1].mlp.down_proj is model.model.layers[0].mlp.down_proj


def test_text_with_a_tokenizer(tiny_llama, tokenizer) -> None:
    model = tiny_llama()
    forget = [Example(answer="she wrote it .", question="who wrote it ?"), "the red house"]
    report = separate_(
        model,
        forget,
        ["a garden in the house .", Example(answer="he", question="who is it ?")],
        SeparationConfig(GeometricConfig(ortho_ratio=0.2, target_nll=6.0), TARGETS),
        tokenizer=tokenizer,
    )
    assert report.settings["general_text"]
    assert not any("general text" in text for text in report.warnings)
    assert report.forget_ppl["0.0"] > report.forget_ppl["1.0"]


def test_no_general_text_for_want_of_a_tokenizer(memorised, config) -> None:
    m = memorised
    with_text = SeparationConfig(config().method, TARGETS)
    report = separate_(m.model, m.forget, m.retain, with_text)
    assert any("general text" in text for text in report.warnings)
    assert "general text" in str(report)


def test_other_forms_of_a_set(memorised, config) -> None:
    m = memorised
    twin = copy.deepcopy(m.model)
    forget = [
        {"input_ids": list(item.ids), "labels": [-100, -100, *item.ids[2:]]} for item in m.forget
    ]
    assert (
        separate_(m.model, m.forget, m.retain, config()).forget_ppl
        == separate_(twin, forget, m.retain, config()).forget_ppl
    )


def test_spectral(memorised, known) -> None:
    m = memorised
    method = SpectralConfig(
        ortho_ratio=0.05,
        use_low_rank=False,
        selection="absolute",
        base=BaseConfig(scale="absmax"),
    )
    twin = copy.deepcopy(m.model)
    report = separate_(
        m.model, m.forget, m.retain, SeparationConfig(method, TARGETS, general_text=False)
    )
    assert [layer.ortho_numel for layer in report.layers] == [round(0.05 * 8192)] * 4
    assert {layer.kind for layer in report.layers} == {"sparse"}
    # Nothing in a weight alone says what is private, and the report says that it was not found.
    assert not report.reached
    assert report.warnings
    assert known(m.model, m.forget) > 0.8
    replace_linear_layers(
        twin, TARGETS, 0.05, use_low_rank=False, selection="absolute", scale="absmax"
    )
    other = twin.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in m.model.state_dict().items())


def test_spectral_fallback_is_in_the_report(memorised) -> None:
    m = memorised
    method = SpectralConfig(rank_ratio={"up_proj": 0.1, "down_proj": 1.0})
    with pytest.warns(UserWarning, match=r"^model\.layers\.\d\.mlp\.up_proj: low-rank") as caught:
        report = separate_(
            m.model, m.forget, m.retain, SeparationConfig(method, TARGETS, general_text=False)
        )
    assert len({str(warning.message).split(":")[0] for warning in caught}) == 2
    notes = {layer.name: layer.note for layer in report.layers}
    assert all(("low-rank error" in note) == ("up_proj" in name) for name, note in notes.items())
    assert "low-rank error" in str(report)


@pytest.mark.parametrize(("sequences", "steps", "share"), [(3, 3, 1.0), (4, 4, 1.0), (8, 8, 0.5)])
def test_long_epochs_take_shorter_steps_and_are_as_many_and_all_retain_text_is_drawn(
    memorised, sequences: int, steps: int, share: float, config, monkeypatch
) -> None:
    m = memorised
    rates: list[float] = []
    counted = drawn = 0

    def epoch(self: fitting.Fit, rate: float) -> dict[str, LowRankEdit]:
        rates.append(rate)
        return self._descent.edits()

    def first(self: fitting.Fit, *args: object) -> None:
        nonlocal counted, drawn
        made(self, *args)
        counted = self._steps
        drawn = len({item.ids for _ in range(200) for item in next(self._kept)})

    made = fitting.Fit.__init__
    monkeypatch.setattr(fitting.Fit, "epoch", epoch)
    monkeypatch.setattr(fitting.Fit, "__init__", first)
    forget = [m.forget[i % len(m.forget)] for i in range(sequences)]
    method = {"batch": 1, "fit_steps": 24, "rate": 0.4, "target_nll": 30.0}
    separate_(m.model, forget, m.retain, config(**method))
    assert counted == steps
    assert drawn == len({item.ids for item in m.retain})
    assert rates == [0.4 * share] * (24 // min(steps, 4))
