"""A baseline that is killed goes on, and ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from libortho import training
from libortho.baselines.lora_null import LoraNullConfig
from libortho.baselines.losses import NPO, RMU, GradDiff, Objective, SimNPO
from libortho.baselines.registry import run_baseline_
from libortho.baselines.tune import TuneConfig, tune
from libortho.baselines.unlearn import UnlearnConfig, UnlearnOutcome, unlearn_

TIMES = ("training_seconds", "measuring_seconds", "peak_memory", "seconds")


@pytest.fixture(autouse=True)
def _save_every_epoch(monkeypatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)


def without_times(outcome: object) -> dict:
    return {k: v for k, v in dataclasses.asdict(outcome).items() if k not in TIMES}


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(value, right[key]) for key, value in left.items())


def kill_in(epoch: int):
    def tell(stage: str, done: int, total: int) -> None:
        if f"epoch {epoch}," in stage:
            raise KeyboardInterrupt

    return tell


METHODS = [
    (GradDiff(), 2e-3),
    (NPO(), 2e-3),
    (SimNPO(), 2e-3),
    (RMU(layer=1, trained_layers=2), 2e-2),
]


@pytest.mark.parametrize(("objective", "rate"), METHODS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("stop_at", [None, 0.5])
def test_it_ends_where_another_would(
    memorised, tmp_path: Path, objective: Objective, rate: float, stop_at: float | None
) -> None:
    epochs = 6 if stop_at is None else 60
    rate *= 1.0 if stop_at is None else 0.25
    config = UnlearnConfig(objective, rate, max_epochs=epochs, batch_size=2, landing_steps=3)
    whole = copy.deepcopy(memorised.model)
    expected = unlearn_(whole, memorised.forget, memorised.retain, config, stop_at=stop_at)
    assert expected.epochs >= 4  # there is an epoch to be killed in, and one after it

    state = tmp_path / "new" / "state"
    killed = copy.deepcopy(memorised.model)
    with pytest.raises(KeyboardInterrupt):
        unlearn_(killed, memorised.forget, memorised.retain, config, kill_in(3), stop_at, state)
    assert [f.name for f in state.parent.iterdir()] == ["state"]

    stages: list[str] = []
    resumed = copy.deepcopy(memorised.model)
    outcome = unlearn_(
        resumed,
        memorised.forget,
        memorised.retain,
        config,
        lambda stage, *_: stages.append(stage),
        stop_at,
        state,
    )
    assert stages[0].startswith("epoch 3,")
    assert without_times(outcome) == without_times(expected)
    assert outcome.training_seconds > 0
    assert_equal(resumed, whole)

    # Started once more, it is at its end: no step is taken.
    assert [f.name for f in state.parent.iterdir()] == ["state.end"]
    again = copy.deepcopy(memorised.model)
    repeated = unlearn_(
        again, memorised.forget, memorised.retain, config, kill_in(1), stop_at, state
    )
    assert repeated.training_seconds == outcome.training_seconds
    assert without_times(repeated) == without_times(expected)
    assert_equal(again, whole)


def test_dropout_goes_on_too(random_tokens, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    start = GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=2, **shape))
    forget, retain = random_tokens([8] * 4, seed=1), random_tokens([8] * 8, seed=2)
    config = UnlearnConfig(NPO(), 1e-3, max_epochs=4, batch_size=2)
    models, outcomes = [], []
    for kill in (False, True):
        torch.manual_seed(7)
        model, state = copy.deepcopy(start), None
        if kill:
            state = tmp_path / "state"
            with pytest.raises(KeyboardInterrupt):
                unlearn_(copy.deepcopy(start), forget, retain, config, kill_in(3), state=state)
            torch.manual_seed(99)  # a new process
        outcomes.append(unlearn_(model, forget, retain, config, state=state))
        models.append(model)
    assert without_times(outcomes[0]) == without_times(outcomes[1])
    assert_equal(*models)


def test_a_split_goes_on(memorised, tmp_path: Path) -> None:
    config = LoraNullConfig(UnlearnConfig(NPO(), 1e-2, max_epochs=5), ortho_ratio=0.1)
    whole, resumed = copy.deepcopy(memorised.model), copy.deepcopy(memorised.model)
    expected, _ = run_baseline_(whole, memorised.forget, memorised.retain, config)
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        run_baseline_(
            copy.deepcopy(memorised.model),
            memorised.forget,
            memorised.retain,
            config,
            kill_in(4),
            state=state,
        )
    outcome, report = run_baseline_(
        resumed, memorised.forget, memorised.retain, config, state=state
    )
    assert without_times(outcome) == without_times(expected)
    assert report is not None
    assert_equal(whole, resumed)


@pytest.mark.parametrize("run", [1, 2])
def test_tuning_goes_on(memorised, tmp_path: Path, run: int) -> None:
    def tuned(progress=None, states: Path | None = None):
        return tune(
            lambda: copy.deepcopy(memorised.model),
            memorised.forget,
            memorised.retain,
            UnlearnConfig(NPO(), 1e-3),
            0.5,
            TuneConfig((1e-3, 3.0), max_epochs=4, retain_sequences=10),
            progress,
            states,
        )

    def killed(stage: str, done: int, total: int) -> None:
        if f"({run} of 2): epoch 2" in stage:
            raise KeyboardInterrupt

    expected = tuned()
    with pytest.raises(KeyboardInterrupt):
        tuned(killed, tmp_path)
    stages: list[str] = []
    outcome = tuned(lambda stage, *_: stages.append(stage), tmp_path)
    assert f"({run} of 2): epoch 2" in stages[0]
    assert outcome.chosen == expected.chosen
    for one, other in zip(outcome.candidates, expected.candidates, strict=True):
        assert without_times(one) == without_times(other)
        assert one.seconds >= one.training_seconds + one.measuring_seconds
    assert_equal(outcome.model, expected.model)


def test_without_a_state_nothing_is_written(memorised, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = unlearn_(
        memorised.model, memorised.forget, memorised.retain, UnlearnConfig(max_epochs=2)
    )
    assert isinstance(outcome, UnlearnOutcome)
    assert not list(tmp_path.iterdir())
