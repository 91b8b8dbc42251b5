"""tune and the registry: which run is kept, and that every run is recorded."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from libortho import OrthoLinear
from libortho.baselines.lora_null import LoraNullConfig
from libortho.baselines.losses import NPO, RMU, GradDiff, SimNPO
from libortho.baselines.registry import BASELINES, baseline, run_baseline_
from libortho.baselines.tune import Candidate, TuneConfig, best_of, tune
from libortho.baselines.unlearn import UnlearnConfig
from libortho.data.sampling import evenly
from libortho.scoring import answer_probability, sequence_nll


def known(model, items) -> float:
    return answer_probability(sequence_nll(model, items))


def candidate(forget: float, retain: float, reached: bool = False) -> Candidate:
    return Candidate(1e-5, 1, 1, reached, False, forget, retain, 1.0, 1.0, 0, 2.0)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        # reached: the best retain probability, however low another's forget probability
        ([(0.1, 0.5, True), (0.2, 0.7, True), (0.3, 0.9, False)], 1),
        ([(0.1, 0.01, True), (0.5, 0.9, False)], 0),
        # none reached: the lowest forget probability at which retain is at least half of 0.9
        ([(0.6, 0.9, False), (0.5, 0.45, False), (0.1, 0.44, False)], 1),
        # all broken: the least broken
        ([(0.0, 0.1, False), (0.3, 0.2, False), (0.1, 0.0, False)], 1),
        # equals: the first; NaN: never before a number
        ([(0.2, 0.7, True), (0.2, 0.7, True)], 0),
        ([(math.nan, math.nan, False), (0.6, 0.8, False)], 1),
        ([(math.nan, math.nan, False), (0.0, 0.0, False)], 0),
    ],
)
def test_best_of(candidates, chosen: int) -> None:
    assert best_of([candidate(*c) for c in candidates], 0.9) == chosen


def test_the_grid_is_run_and_its_best_model_kept(memorised) -> None:
    made = []

    def make():
        made.append(copy.deepcopy(memorised.model))
        return made[-1]

    stages = []
    outcome = tune(
        make,
        memorised.forget,
        memorised.retain,
        UnlearnConfig(NPO(), 1e-3, landing_steps=6),
        0.4,
        TuneConfig((1e-3, 3.0, 30.0), max_epochs=12, retain_sequences=10),
        lambda stage, done, total: stages.append(stage),
    )
    sample = evenly(memorised.retain, 10)
    assert outcome.original_retain_probability == known(memorised.model, sample)
    assert [c.learning_rate for c in outcome.candidates] == pytest.approx([1e-6, 3e-3, 3e-2])
    assert [c.reached for c in outcome.candidates] == [False, True, True]
    assert outcome.candidates[0].epochs == 12
    assert outcome.model is made[outcome.chosen]
    for model, run in zip(made, outcome.candidates, strict=True):
        assert run.forget_probability == pytest.approx(known(model, memorised.forget), rel=1e-6)
        assert run.retain_probability == known(model, sample)
        assert run.seconds >= run.training_seconds > 0
    assert outcome.chosen == best_of(outcome.candidates, outcome.original_retain_probability)
    assert outcome.candidates[outcome.chosen].reached
    assert outcome.seconds >= sum(c.seconds for c in outcome.candidates)
    assert outcome.report is None
    assert stages[0].startswith("learning rate 1e-06 (1 of 3): epoch 1, ")
    assert stages[-1].startswith("learning rate 0.03 (3 of 3): ")


def test_no_more_than_two_models_at_once(memorised) -> None:
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def make():
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        model = copy.deepcopy(memorised.model)
        alive.append(weakref.ref(model))
        return model

    tune(
        make,
        memorised.forget,
        memorised.retain,
        UnlearnConfig(NPO(), 1e-3),
        0.5,
        TuneConfig((1.0, 2.0, 3.0, 4.0), max_epochs=2),
    )
    assert len(alive) == 4


def test_a_split_is_judged_as_it_is_deployed(memorised) -> None:
    settings = LoraNullConfig(
        training=UnlearnConfig(NPO(), 1e-2), ortho_ratio=0.1, target_modules=("down_proj",)
    )
    outcome = tune(
        lambda: copy.deepcopy(memorised.model),
        memorised.forget,
        memorised.retain,
        settings,
        0.4,
        TuneConfig((0.5, 1.0), max_epochs=30),
    )
    chosen = outcome.candidates[outcome.chosen]
    assert isinstance(outcome.model.model.layers[0].mlp.down_proj, OrthoLinear)
    assert outcome.report is not None
    assert outcome.report.settings["method"]["training"]["learning_rate"] == chosen.learning_rate
    assert chosen.forget_probability == known(outcome.model, memorised.forget)
    assert chosen.retain_probability == known(outcome.model, memorised.retain)


def test_a_run_that_diverges_is_recorded_and_not_kept(memorised) -> None:
    outcome = tune(
        lambda: copy.deepcopy(memorised.model),
        memorised.forget,
        memorised.retain,
        UnlearnConfig(GradDiff(), 1e-3),
        1e-30,
        TuneConfig((1e33, 1e-3), max_epochs=2),
    )
    assert outcome.candidates[0].diverged
    assert outcome.chosen == 1
    assert all(bool(torch.isfinite(p).all()) for p in outcome.model.parameters())


def test_registry_makes_every_method() -> None:
    assert list(BASELINES) == ["graddiff", "npo", "simnpo", "rmu", "lora-null"]
    kinds = [type(baseline(n).objective) for n in ("graddiff", "npo", "simnpo", "rmu")]
    assert kinds == [GradDiff, NPO, SimNPO, RMU]
    assert isinstance(baseline("lora-null"), LoraNullConfig)
    rates = [baseline("npo").learning_rate * f for f in TuneConfig().learning_rate_factors]
    assert rates == pytest.approx([1e-5, 5e-5, 2e-4])
    with pytest.raises(ValueError, match="baseline 'NPO': expected one of graddiff, npo, simnpo"):
        baseline("NPO")


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_runs_by_name(memorised, name: str) -> None:
    settings = baseline(name)
    if name == "lora-null":
        settings = dataclasses.replace(settings, ortho_ratio=0.1)
    before = known(memorised.model, memorised.forget)
    outcome, report = run_baseline_(memorised.model, memorised.forget, memorised.retain, settings)
    assert outcome.epochs == 10
    assert (report is not None) == (name == "lora-null")
    assert known(memorised.model, memorised.forget) < before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate_factors": ()}, ValueError, "learning_rate_factors is empty"),
        ({"learning_rate_factors": (1.0, 0.0)}, ValueError, r"learning_rate_factors=0\.0"),
        ({"learning_rate_factors": ("1",)}, TypeError, "learning_rate_factors='1'"),
        ({"max_epochs": 0}, ValueError, "max_epochs=0: expected an integer >= 1"),
        ({"retain_sequences": 0}, ValueError, "retain_sequences=0: expected an integer >= 1"),
        ({"least_retain": 1.1}, ValueError, r"least_retain=1\.1: expected a fraction in \[0, 1\]"),
    ],
)
def test_bad_budgets(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TuneConfig(**settings)


def test_bad_sets(memorised) -> None:
    with pytest.raises(ValueError, match="the retain set is empty"):
        tune(lambda: memorised.model, memorised.forget, [], UnlearnConfig(), 0.5)
    with pytest.raises(ValueError, match="stop_at=2: expected a fraction"):
        tune(lambda: memorised.model, memorised.forget, memorised.retain, UnlearnConfig(), 2)
