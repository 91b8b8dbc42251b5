"""unlearn_: every method forgets what was memorised, as far as asked and no further."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from libortho.baselines.losses import NPO, RMU, GradDiff, Objective, SimNPO
from libortho.baselines.unlearn import UnlearnConfig, unlearn_
from libortho.data.tokens import Tokens
from libortho.memory import PeakMemory
from libortho.scoring import answer_probability, sequence_nll
from libortho.training import MemoriseConfig, memorise_

METHODS = [
    (GradDiff(), 2e-3),
    (NPO(), 2e-3),
    (SimNPO(), 2e-3),
    (RMU(layer=1, trained_layers=2), 2e-2),
]


def known(model, items) -> float:
    return answer_probability(sequence_nll(model, items))


@pytest.mark.parametrize(("objective", "rate"), METHODS, ids=lambda x: type(x).__name__)
def test_forgets_to_the_level_and_keeps_the_rest(memorised, objective: Objective, rate) -> None:
    model, forget, retain = memorised.model, memorised.forget, memorised.retain
    kept = known(model, retain)
    config = UnlearnConfig(objective, rate, max_epochs=60, batch_size=3, landing_steps=6)
    outcome = unlearn_(model, forget, retain, config, stop_at=0.4)
    assert outcome.reached is True
    assert not outcome.diverged
    assert outcome.probability == pytest.approx(known(model, forget), rel=1e-6)
    assert 0.3 < outcome.probability <= 0.4
    assert known(model, retain) > 0.7 * kept
    assert outcome.epochs == outcome.steps  # three sequences, three a step
    assert len(outcome.probabilities) == outcome.epochs + 1
    assert outcome.probabilities[0] > 0.9
    assert all(p > 0.4 for p in outcome.probabilities[:-1])
    assert outcome.probabilities[-1] <= 0.4
    assert outcome.training_seconds > 0
    assert outcome.measuring_seconds > 0
    assert not model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_after_memorise_in_bf16(tiny_llama, random_tokens) -> None:
    model = tiny_llama().to(torch.bfloat16)
    forget, retain = random_tokens([8] * 4, seed=1), random_tokens([8] * 8, seed=2)
    memorise_(
        model, [*forget, *retain], MemoriseConfig(target=0.9, max_epochs=80, learning_rate=1e-2)
    )
    assert known(model, forget) > 0.8
    outcome = unlearn_(
        model, forget, retain, UnlearnConfig(NPO(), 3e-3, max_epochs=40), stop_at=0.3
    )
    assert outcome.reached
    assert known(model, forget) <= 0.3
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_without_a_level_it_runs_every_epoch(memorised) -> None:
    outcome = unlearn_(
        memorised.model,
        memorised.forget,
        memorised.retain,
        UnlearnConfig(NPO(), 1e-3, max_epochs=3, batch_size=2),
    )
    assert (outcome.epochs, outcome.steps, outcome.reached) == (3, 6, None)
    assert outcome.probability == outcome.probabilities[-1] < outcome.probabilities[0]


def test_too_few_epochs_are_told(memorised) -> None:
    config = UnlearnConfig(NPO(), 1e-6, max_epochs=1)
    outcome = unlearn_(memorised.model, memorised.forget, memorised.retain, config, stop_at=0.1)
    assert outcome.reached is False
    assert outcome.probability > 0.9


def test_nothing_to_forget_changes_nothing(memorised, snapshot) -> None:
    before = snapshot(memorised.model)["state"]
    level = known(memorised.model, memorised.unseen) * 1.01
    outcome = unlearn_(memorised.model, memorised.unseen, memorised.retain, stop_at=level)
    assert (outcome.steps, outcome.epochs, outcome.reached) == (0, 0, True)
    after = memorised.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_landing_ends_between_the_epochs(memorised) -> None:
    ends = {}
    for steps in (0, 6):
        model = copy.deepcopy(memorised.model)
        config = UnlearnConfig(GradDiff(), 2e-2, max_epochs=20, landing_steps=steps)
        outcome = unlearn_(model, memorised.forget, memorised.retain, config, stop_at=0.5)
        assert outcome.probability == pytest.approx(known(model, memorised.forget), rel=1e-6)
        ends[steps] = outcome
    assert ends[0].probabilities == ends[6].probabilities
    assert ends[0].probability == ends[0].probabilities[-1] < 0.2
    assert 0.4 < ends[6].probability <= 0.5


def test_same_seed_same_weights(memorised) -> None:
    states = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(memorised.model)
        config = UnlearnConfig(SimNPO(), 1e-3, max_epochs=2, batch_size=2, seed=seed)
        unlearn_(model, memorised.forget, memorised.retain, config)
        states.append(model.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_divergence_is_told_and_weights_stay_finite(memorised) -> None:
    config = UnlearnConfig(GradDiff(), 1e30, max_epochs=8)
    outcome = unlearn_(memorised.model, memorised.forget, memorised.retain, config)
    assert outcome.diverged
    assert all(bool(torch.isfinite(p).all()) for p in memorised.model.parameters())
    assert outcome.steps < 8


def test_only_the_methods_weights_change(memorised) -> None:
    model = memorised.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = UnlearnConfig(RMU(layer=1, trained_layers=1), 1e-2, max_epochs=1)
    unlearn_(model, memorised.forget, memorised.retain, config)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


def test_progress_counts_up(memorised) -> None:
    seen = []
    config = UnlearnConfig(max_epochs=2, batch_size=1)
    unlearn_(
        memorised.model,
        memorised.forget,
        memorised.retain,
        config,
        lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert [(done, total) for _, done, total in seen] == [(i, 6) for i in range(1, 7)]
    assert seen[0][0].startswith("epoch 1, forget probability 0.9")


def test_peak_memory_sees_what_was_held_for_a_while() -> None:
    with PeakMemory() as memory:
        held = torch.ones(64 * 2**20 // 4)
        del held
        quiet = memory.growth
        held = torch.ones(192 * 2**20 // 4)
        while memory.growth < 160 * 2**20:
            held.add_(1)
    assert quiet < 160 * 2**20 <= memory.growth < 400 * 2**20


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UnlearnConfig(learning_rate=0.0), ValueError, "learning_rate=0.0: expected"),
        (lambda: UnlearnConfig(learning_rate=-1e-5), ValueError, "learning_rate=-1e-05"),
        (lambda: UnlearnConfig(learning_rate=math.nan), ValueError, "learning_rate=nan"),
        (lambda: UnlearnConfig(max_epochs=0), ValueError, "max_epochs=0: expected an integer >= 1"),
        (lambda: UnlearnConfig(batch_size=2.0), ValueError, "batch_size=2.0: expected an integer"),
        (lambda: UnlearnConfig(landing_steps=-1), ValueError, "landing_steps=-1"),
        (lambda: UnlearnConfig("npo"), TypeError, "objective='npo': expected a method's config"),
    ],
)
def test_bad_settings(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_sets(memorised, snapshot) -> None:
    model, forget, retain = memorised.model, memorised.forget, memorised.retain
    before = snapshot(model)
    with pytest.raises(ValueError, match="the forget set is empty"):
        unlearn_(model, [], retain)
    with pytest.raises(ValueError, match="the retain set is empty"):
        unlearn_(model, forget, [])
    with pytest.raises(ValueError, match=r"stop_at=1\.5: expected a fraction"):
        unlearn_(model, forget, retain, stop_at=1.5)
    with pytest.raises(ValueError, match="token id 99 is outside the model's vocabulary of 64"):
        unlearn_(model, [Tokens((1, 99))], retain)
    after = snapshot(model)
    assert after["flags"] == before["flags"]
    assert after["grads"] == before["grads"]
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
