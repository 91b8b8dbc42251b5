"""Perturbed weights: each change by hand, and the model as it was afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from libortho.attacks import perturbation as module
from libortho.attacks.perturbation import PROBABILITY, PerturbationConfig, perturbation
from libortho.base import quantize
from libortho.config import BaseConfig
from libortho.scoring import answer_probability, sequence_nll

CONFIG = PerturbationConfig(int4_groups=(16, 32), int8_groups=(None, 16), undone=(1, 2))
NONE = PerturbationConfig(int4_groups=(), int8_groups=(), prune=(), noise=(), undone=())


def test_every_change_is_scored(subjects, data, quiet, unharmed) -> None:
    for name, subject in subjects.items():
        check = unharmed(subject)
        found = perturbation(subject, data, CONFIG, quiet)
        check()
        scores = {score.name: score for score in found.scores}
        assert list(scores) == [
            "unchanged",
            "INT4, a scale for 16 columns",
            "INT4, a scale for 32 columns",
            "INT8, a scale for a row",
            "INT8, a scale for 16 columns",
            "smallest 10% pruned",
            "noise of 2%",
            "noise of 5%",
            "public weights put back",
            "largest 1 of the difference taken out",
            "largest 2 of the difference taken out",
        ]
        assert {score.measure for score in found.scores} == {PROBABILITY}
        forget, retain = data.encode(data.forget), data.encode(data.retain)
        known = answer_probability(sequence_nll(subject.dense(), forget))
        assert scores["unchanged"].value == pytest.approx(known)
        assert scores["unchanged"].details["shift"] == 0.0
        kept = answer_probability(sequence_nll(subject.dense(), retain))
        assert scores["unchanged"].details["retain_probability"] == pytest.approx(kept)
        noisy = scores["noise of 5%"]
        assert noisy.details["shift"] == pytest.approx(noisy.value - known)
        assert noisy.value != scores["noise of 2%"].value
        # INT8 in any groups is next to nothing; INT4 is something.
        assert abs(scores["INT8, a scale for a row"].details["shift"]) < 0.05, name


def test_the_stored_base_is_what_is_stored_anew(subjects, data, quiet, monkeypatch) -> None:
    """Not the attacker's bf16 copy of it: INT8 rounded again to its own grid does not move."""
    subject = subjects["alpha 0"]
    seen = []
    write = module._write

    def watch(layer, weight) -> None:
        seen.append(weight)
        write(layer, weight)

    monkeypatch.setattr(module, "_write", watch)
    config = dataclasses.replace(NONE, int8_groups=(None,))
    perturbation(subject, data, config, quiet)
    layers = [subject.model.get_submodule(name) for name in subject.layers]
    assert len(seen) == len(layers)
    for weight, layer in zip(seen, layers, strict=True):
        torch.testing.assert_close(weight, layer.base.dequantize(), atol=1e-6, rtol=1e-5)


def test_groups_that_do_not_fit_are_said(subjects, data, quiet) -> None:
    config = dataclasses.replace(NONE, int4_groups=(48,))
    found = perturbation(subjects["reference"], data, config, quiet)
    assert [score.name for score in found.scores] == ["unchanged"]
    assert "group_size=48 does not divide" in found.missing["INT4, a scale for 48 columns"]


def test_the_changes_themselves() -> None:
    weight, public = torch.randn(40, 64), torch.randn(40, 64)
    config = dataclasses.replace(
        NONE, int4_groups=(32,), prune=(0.1,), noise=(0.05,), undone=(2,), seed=3
    )
    int4, prune, noise, back, undo = (c.apply for c in module._changes(config))
    stored = BaseConfig("int4", group_size=32, rounding="nearest")
    assert torch.equal(int4(weight, public), quantize(weight, stored).dequantize())
    pruned = prune(weight, public)
    assert int((pruned == 0).sum()) == 256  # a tenth of 2560
    assert weight[pruned == 0].abs().max() <= pruned[pruned != 0].abs().min()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    moved = noise(weight, public) - weight
    assert float(moved.std() / weight.std()) == pytest.approx(0.05, rel=0.1)
    few = torch.randn(2, 2)
    assert torch.equal(module._pruned(few, few, 0.1), few)  # a tenth of 4 weights is none
    assert torch.equal(back(weight, public), public)
    torch.testing.assert_close(
        torch.linalg.svdvals(undo(weight, public) - public)[:-2],
        torch.linalg.svdvals(weight - public)[2:],
        atol=1e-4,
        rtol=1e-4,
    )
    assert torch.equal(undo(public, public), public)


def test_an_edit_of_few_directions_can_be_undone() -> None:
    public, learned = torch.randn(40, 64), 0.01 * torch.randn(40, 64)
    edit = torch.randn(40, 3) @ torch.randn(3, 64)
    undone = module._undone(public + learned + edit, public, count=3)
    assert float((undone - public - learned).norm()) < 0.5 * float(learned.norm())


def test_without_the_public_model(subjects, data, quiet) -> None:
    config = dataclasses.replace(NONE, undone=(1,))
    alone = dataclasses.replace(data, pretrained=None)
    found = perturbation(subjects["alpha 0"], alone, config, quiet)
    assert [score.name for score in found.scores] == ["unchanged"]
    assert set(found.missing) == {
        "public weights put back",
        "largest 1 of the difference taken out",
    }
    assert all("--pretrained" in reason for reason in found.missing.values())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"int4_groups": (0,)}, "group_size=0"),
        ({"int8_groups": (-1,)}, "group_size=-1"),
        ({"prune": (2.0,)}, "prune=2.0"),
        ({"noise": (-0.1,)}, "noise=-0.1"),
        ({"undone": (0,)}, "undone=0"),
    ],
)
def test_configs_that_cannot_be(change, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PerturbationConfig(**change)
