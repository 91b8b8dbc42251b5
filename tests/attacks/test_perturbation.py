"""Perturbed weights: each change by hand, and the model as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from libortho.attacks import perturbation as module
from libortho.attacks.perturbation import PROBABILITY, PerturbationConfig, perturbation
from libortho.base import quantize
from libortho.config import BaseConfig
from libortho.scoring import answer_probability, sequence_nll

CONFIG = PerturbationConfig(int4_groups=(16, 32), int8_groups=(None, 16))


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
    config = PerturbationConfig(int4_groups=(), int8_groups=(None,), prune=(), noise=())
    perturbation(subject, data, config, quiet)
    layers = [subject.model.get_submodule(name) for name in subject.layers]
    assert len(seen) == len(layers)
    for weight, layer in zip(seen, layers, strict=True):
        torch.testing.assert_close(weight, layer.base.dequantize(), atol=1e-6, rtol=1e-5)


def test_groups_that_do_not_fit_are_said(subjects, data, quiet) -> None:
    config = PerturbationConfig(int4_groups=(48,), int8_groups=(), prune=(), noise=())
    found = perturbation(subjects["reference"], data, config, quiet)
    assert [score.name for score in found.scores] == ["unchanged"]
    assert "group_size=48 does not divide" in found.missing["INT4, a scale for 48 columns"]


def test_the_changes_themselves() -> None:
    weight = torch.randn(40, 64)
    config = PerturbationConfig(
        int4_groups=(32,), int8_groups=(), prune=(0.1,), noise=(0.05,), seed=3
    )
    int4, prune, noise = (change for _, _, change in module._changes(config))
    stored = BaseConfig("int4", group_size=32, rounding="nearest")
    assert torch.equal(int4(weight), quantize(weight, stored).dequantize())
    pruned = prune(weight)
    assert int((pruned == 0).sum()) == 256  # a tenth of 2560
    assert weight[pruned == 0].abs().max() <= pruned[pruned != 0].abs().min()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    moved = noise(weight) - weight
    assert float(moved.std() / weight.std()) == pytest.approx(0.05, rel=0.1)
    few = torch.randn(2, 2)
    assert torch.equal(module._pruned(0.1)(few), few)  # a tenth of 4 weights is none


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"int4_groups": (0,)}, "group_size=0"),
        ({"int8_groups": (-1,)}, "group_size=-1"),
        ({"prune": (2.0,)}, "prune=2.0"),
        ({"noise": (-0.1,)}, "noise=-0.1"),
    ],
)
def test_configs_that_cannot_be(change, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PerturbationConfig(**change)
