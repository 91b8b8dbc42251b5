"""separate_ by the saliency method, on models small enough to look at every entry."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from libortho import BaseConfig, SaliencyConfig, SeparationConfig, alpha_scope, separate_
from libortho.data.tokens import Tokens, encode
from libortho.goal import choose_goal
from libortho.linear import read_linear, select_linear
from libortho.scoring import answer_probability, perplexity, sequence_nll
from libortho.solvers import saliency as solver
from libortho.training import MemoriseConfig, memorise_

TARGETS = ("up_proj", "down_proj")


def config(*, targets: object = TARGETS, **method: object) -> SeparationConfig:
    values = {"ortho_ratio": 0.06, "target_nll": 3.0, "retain_tokens": 128, **method}
    return SeparationConfig(SaliencyConfig(**values), targets, general_text=False)


def known(model: nn.Module, items: Sequence[Tokens], alpha: float = 0.0) -> float:
    with alpha_scope(model, alpha):
        return answer_probability(sequence_nll(model, items))


def test_forgets_keeps_and_restores(memorised) -> None:
    m = memorised
    forget, retain = (answer_probability(sequence_nll(m.model, s)) for s in (m.forget, m.retain))
    weights = {n: x.weight.clone() for n, x in select_linear(m.model, TARGETS).items()}
    report = separate_(m.model, m.forget, m.retain, config())

    assert report.reached
    assert known(m.model, m.forget) < 0.1
    assert known(m.model, m.retain) > retain - 0.1
    assert known(m.model, m.forget, 1.0) == pytest.approx(forget, abs=0.01)
    assert known(m.model, m.retain, 1.0) == pytest.approx(retain, abs=0.01)
    # It stops at the level and does not go beyond; the base is rounded after the search.
    assert 0.5 * report.target["probability"] < known(m.model, m.forget)
    assert report.final_error < 0.01 < report.base_error

    assert {layer.kind for layer in report.layers} == {"sparse"}
    entries = sum(layer.ortho_numel for layer in report.layers)
    assert entries == int(0.06 * 4 * 64 * 128)  # exactly
    for name, weight in weights.items():
        layer = m.model.get_submodule(name)
        chosen = layer.ortho.dense() != 0
        step = layer.base.scale.expand_as(weight)
        residual = weight - layer.base.dequantize()
        error = (layer.effective_weight(1.0) - weight).abs()
        assert (error <= 5e-4 * residual.abs() + 1e-6)[chosen].all()  # FP16
        assert (residual.abs() > step)[chosen].float().mean() > 0.5  # which the base has lost
        # What is not chosen is the original, but for the rounding of the base.
        assert ((layer.base.dequantize() - weight).abs() <= 0.51 * step)[~chosen].all()


def test_an_int4_base_has_forgotten_as_it_is_stored(memorised) -> None:
    """Coarse rounding takes something of an edit away again: the search sees it."""
    m = memorised
    base = BaseConfig("int4", group_size=64)
    report = separate_(m.model, m.forget, m.retain, config(base=base))
    # It lands on the level from the far side, as measured on what is stored.
    assert known(m.model, m.forget) <= report.target["probability"]


def test_chooses_by_gradient_over_root_fisher(memorised) -> None:
    m = memorised
    layers = select_linear(m.model, TARGETS)
    goal = choose_goal(m.model, m.forget, m.retain, target_nll=3.0)
    method = SaliencyConfig(ortho_ratio=0.01, damping=0.5)
    from libortho.solvers.problem import Journal, Problem

    weights = {n: read_linear(x, n)[0] for n, x in layers.items()}
    problem = Problem(m.model, layers, weights, m.forget, m.retain, [], goal, Journal())
    entries = solver._choose(problem, method, goal, 300)

    fisher = solver.fisher_diagonal(m.model, layers, m.retain)
    gradients = solver.feedback(m.model, layers, m.forget, goal.targets, {}).gradients
    mean = torch.cat([f.flatten() for f in fisher.values()]).double().mean()
    scores = torch.cat(
        [
            (gradients[n].double().abs() / (fisher[n].double() + 0.5 * mean).sqrt()).flatten()
            for n in layers
        ]
    )
    flags = torch.cat(
        [torch.zeros(w.numel()).index_fill(0, entries[n], 1.0) for n, w in weights.items()]
    ).bool()
    assert int(flags.sum()) == 300
    assert scores[~flags].max() <= scores[flags].min() * (1 + 1e-5)


def test_keeps_a_model_of_words_that_memorise_taught_it(tiny_llama, tokenizer) -> None:
    model = tiny_llama()
    texts = ["she wrote the red house in a garden", "he is where the garden is", "the red house is"]
    items = [encode(text, tokenizer) for text in texts * 2]
    memorise_(model, items, MemoriseConfig(target=0.9, max_epochs=60, learning_rate=3e-3))
    before = answer_probability(sequence_nll(model, items[:1]))
    assert before > 0.8
    report = separate_(model, items[:1], items[1:3], config(ortho_ratio=0.1, target_nll=2.0))
    assert report.reached
    assert known(model, items[:1]) < 0.3
    assert known(model, items[1:3]) > 0.6
    assert known(model, items[:1], 1.0) == pytest.approx(before, abs=0.02)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_families(families, random_tokens, name: str) -> None:
    family = families[name]
    model = family.build().bfloat16()
    targets = (family.mlp, *family.attention)
    forget, retain = random_tokens([9] * 3, seed=1), random_tokens([9] * 20, seed=2)
    before = perplexity(sequence_nll(model, forget))
    settings = config(targets=targets, ortho_ratio=0.1, target_nll=6.0, steps=8)
    report = separate_(model, forget, retain, settings)
    assert len(report.layers) == 2 * len(targets)
    parameters = sum(layer.numel for layer in report.layers)
    assert sum(layer.ortho_numel for layer in report.layers) == int(0.1 * parameters)
    assert report.forget_ppl["0.0"] > 1.3 * before
    assert report.forget_ppl["1.0"] == pytest.approx(before, rel=0.05)
    assert report.final_error < 0.02 < report.base_error


def test_same_seed_same_split(memorised) -> None:
    m = memorised
    twin, third = copy.deepcopy(m.model), copy.deepcopy(m.model)
    settings = config(steps=6, target_nll=6.0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    separate_(m.model, m.forget, m.retain, settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    separate_(twin, m.forget, m.retain, settings)
    other = twin.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in m.model.state_dict().items())
    separate_(third, m.forget, m.retain, config(steps=6, target_nll=6.0, seed=1))
    assert any(not torch.equal(v, other[key]) for key, v in third.state_dict().items())


@pytest.mark.parametrize("storage", ["int8", "fp16"])
def test_a_level_beyond_the_budget(memorised, storage: str) -> None:
    m = memorised
    settings = config(ortho_ratio=0.002, steps=2, base=BaseConfig(storage=storage))
    report = separate_(m.model, m.forget, m.retain, settings)
    assert report.reached is False
    assert any("NOT forgotten" in text for text in report.warnings)
    assert known(m.model, m.forget) < known(m.model, m.forget, 1.0)


def test_a_failure_in_any_stage_changes_nothing(memorised, snapshot) -> None:
    m = memorised
    before = snapshot(m.model)
    stages: list[str] = []
    settings = config(steps=3, target_nll=9.0)
    separate_(
        copy.deepcopy(m.model),
        m.forget,
        m.retain,
        settings,
        progress=lambda stage, *_: stages.append(stage.split(",")[0]),
    )
    assert {"goal", "statistics", "descent", "quantise", "measure"} <= set(stages)
    for wanted in sorted(set(stages)):

        def stop(stage: str, done: int, total: int, wanted: str = wanted) -> None:
            if stage.startswith(wanted) and done == total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            separate_(m.model, m.forget, m.retain, settings, progress=stop)
        after = snapshot(m.model)
        for part in ("modules", "flags", "grads"):
            assert after[part] == before[part]
        assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())


def test_budget_for_no_entry(memorised) -> None:
    m = memorised
    with pytest.raises(ValueError, match=r"ortho_ratio=1e-05 pays for none of the layers' 32768"):
        separate_(m.model, m.forget, m.retain, config(ortho_ratio=1e-5))
