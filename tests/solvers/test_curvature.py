"""separate_ by the curvature method, with a forget set that is only measured, and with none."""

from __future__ import annotations

import copy

import pytest
import torch

from libortho import CurvatureConfig, GeometricConfig, SeparationConfig, SpectralConfig, separate_
from libortho.gradients import kronecker_factors
from libortho.linear import select_linear
from libortho.methods.curvature import memorised_part, sink_directions
from libortho.scoring import perplexity, sequence_nll

TARGETS = ("up_proj", "down_proj")


def config(*, targets: object = TARGETS, **method: object) -> SeparationConfig:
    values = {"ortho_ratio": 0.2, **method}
    return SeparationConfig(CurvatureConfig(**values), targets, general_text=False)


@pytest.mark.parametrize("forget", [None, []])
def test_no_forget_set(memorised, forget: list | None) -> None:
    m = memorised
    before = perplexity(sequence_nll(m.model, m.retain))
    report = separate_(m.model, forget, m.retain, config())
    assert report.reached is None
    assert report.forget_ppl == {}
    assert "no forget set was given" in report.target["aimed_at"]
    assert "nothing is claimed" in str(report)
    assert "NOT REACHED" not in str(report)
    assert report.to_dict()["reached"] is None
    assert report.settings["forget_sequences"] == 0
    assert report.retain_ppl["1.0"] == pytest.approx(before, rel=0.01)
    assert report.final_error < 0.01 < report.base_error


def test_a_forget_set_is_measured_and_not_looked_at(memorised) -> None:
    m = memorised
    twin = copy.deepcopy(m.model)
    separate_(twin, None, m.retain, config())
    report = separate_(m.model, m.forget, m.retain, config())
    other = twin.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in m.model.state_dict().items())
    target = report.target
    assert report.reached is (target["reached_probability"] < target["probability"])
    assert report.forget_ppl["0.0"] > report.forget_ppl["1.0"]


def test_stores_the_best_part_of_what_is_memorised(memorised) -> None:
    m = memorised
    layers = select_linear(m.model, TARGETS)
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    factors = kronecker_factors(m.model, layers, m.retain, seed=0)
    report = separate_(m.model, None, m.retain, config(kept_mass=0.6, ortho_dtype="float32"))
    stored = total = 0.0
    for layer in report.layers:
        f = factors[layer.name]
        body = f.inputs.body.dense() / f.inputs.tokens
        sink = sink_directions(f.inputs.first.dense() / f.inputs.sequences, body)
        part = memorised_part(weights[layer.name], body, f.outputs, 0.6, sink).double()
        u, s, v = torch.linalg.svd(part, full_matrices=False)
        assert 0 < layer.rank < len(s)
        best = (u[:, : layer.rank] * s[: layer.rank]) @ v[: layer.rank]
        split = m.model.get_submodule(layer.name)
        torch.testing.assert_close(split.ortho.dense().double(), best, atol=1e-3, rtol=1e-3)
        # alpha = 1 is the original, and the base lacks what is stored, no more
        torch.testing.assert_close(
            split.base.dequantize().double(),
            weights[layer.name].double() - best,
            atol=0.51 * float(split.base.scale.max()),
            rtol=0,
        )
        share = float(s[: layer.rank].norm() / s.norm())
        assert f"ortho holds {share:.1%} of the norm" in layer.note
        stored += float(s[: layer.rank].square().sum())
        total += float(s.square().sum())
    assert report.target["stored_share"] == pytest.approx((stored / total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.03, 0.3])
def test_keeps_the_budget(memorised, ratio: float) -> None:
    m = memorised
    report = separate_(m.model, None, m.retain, config(ortho_ratio=ratio))
    assert 0.8 * ratio < report.density <= ratio


def test_a_budget_for_everything_stores_everything(memorised) -> None:
    m = memorised
    report = separate_(m.model, None, m.retain, config(ortho_ratio=1.0, kept_mass=0.999))
    assert report.target["stored_share"] > 0.95


def test_a_layer_with_nothing_memorised(memorised) -> None:
    m = memorised
    name = "model.layers.0.mlp.down_proj"
    m.model.get_submodule(name).weight.data.zero_()
    report = separate_(m.model, None, m.retain, config(targets="down_proj"))
    (layer,) = [layer for layer in report.layers if layer.name == name]
    assert layer.rank == 0
    assert layer.note == "there is no memorised part"
    assert 0 < report.target["stored_share"] < 1


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_families(families, random_tokens, name: str) -> None:
    family = families[name]
    model = family.build()
    targets = (family.mlp, *family.attention)
    forget, retain = random_tokens([9] * 3, seed=1), random_tokens([9] * 40, seed=2)
    before = perplexity(sequence_nll(model, forget))
    report = separate_(model, forget, retain, config(targets=targets, kept_mass=0.9))
    assert len(report.layers) == 2 * len(targets)
    assert {layer.kind for layer in report.layers} == {"low_rank"}
    assert report.forget_ppl["1.0"] == pytest.approx(before, rel=0.05)
    assert report.final_error < 0.02 < report.base_error


def test_same_seed_same_split(memorised) -> None:
    m = memorised
    twin = copy.deepcopy(m.model)
    torch.manual_seed(1)
    separate_(m.model, None, m.retain, config())
    torch.manual_seed(2)
    separate_(twin, None, m.retain, config())
    other = twin.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in m.model.state_dict().items())


def test_a_failure_in_any_stage_changes_nothing(memorised, snapshot) -> None:
    m = memorised
    before = snapshot(m.model)
    for wanted in ("statistics", "split layers", "quantise", "measure"):

        def stop(stage: str, done: int, total: int, wanted: str = wanted) -> None:
            if stage == wanted and done == total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            separate_(m.model, None, m.retain, config(), progress=stop)
        after = snapshot(m.model)
        for part in ("modules", "flags", "grads"):
            assert after[part] == before[part]
        assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())


def test_a_layer_that_the_loss_does_not_see_is_named(memorised) -> None:
    m = memorised
    m.model.get_submodule("model.layers.0.mlp.down_proj").weight.data.zero_()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: there is no curvature"):
        separate_(m.model, None, m.retain, config())


def test_refused(memorised) -> None:
    m = memorised
    with pytest.raises(ValueError, match=r"ortho_ratio=0\.001 pays for 32 numbers.*192"):
        separate_(m.model, None, m.retain, config(ortho_ratio=0.001))
    with pytest.raises(ValueError, match="retain set is empty"):
        separate_(m.model, None, [], config())
    for method, name in ((GeometricConfig(), "geometric"), (SpectralConfig(), "spectral")):
        for forget, word in ((None, "missing"), ([], "empty")):
            message = f"forget set is {word}: method '{name}'.*'curvature'"
            with pytest.raises(ValueError, match=message):
                separate_(m.model, forget, m.retain, SeparationConfig(method, TARGETS))
