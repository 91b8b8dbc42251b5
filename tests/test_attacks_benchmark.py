"""benchmarks/attacks.py: a baseline is made anew where what makes it has changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmark_modules import load_benchmark

from libortho.baselines.losses import NPO
from libortho.baselines.registry import baseline
from libortho.data import Example, Task
from libortho.evaluation.job import TofuJob


@pytest.fixture
def attacks(monkeypatch) -> ModuleType:
    return load_benchmark("attacks", monkeypatch)


def test_a_baseline_is_found_again_and_made_again(
    attacks: ModuleType, tiny_llama, tokenizer, tmp_path: Path, monkeypatch
) -> None:
    one = (Example("the red garden", "who is she ?"),)
    task = Task(name="tiny", forget=one, retain=one, unseen=one, holdout=one, source="one question")
    job = TofuJob(model=str(tmp_path / "model"), task=task)
    tiny_llama().save_pretrained(job.model)
    models = object.__new__(attacks.Models)  # as after the job, which takes minutes
    models._folder, models._job, models._seed, models._level = tmp_path / "out", job, 0, 0.2
    models._tokenizer, models._forget, models._retain = tokenizer, [], []
    models._full = SimpleNamespace(load=tiny_llama)
    tuned: list[Any] = []

    def tune(load, forget, retain, config, level, tuning, tell) -> Any:
        tuned.append((config, level, tuning.max_epochs))
        return SimpleNamespace(model=load(), report=None)

    monkeypatch.setattr(attacks, "tune", tune)
    first = models.baseline("npo")
    assert (first / "model.safetensors").is_file()
    assert models.baseline("npo") == first
    assert len(tuned) == 1

    def bolder(name: str) -> Any:
        return dataclasses.replace(baseline(name), objective=NPO(beta=0.5))

    made = {first}
    for change in (
        lambda: monkeypatch.setattr(attacks, "BASELINE_EPOCHS", 9),
        lambda: monkeypatch.setattr(attacks, "baseline", bolder),
        lambda: setattr(models, "_level", 0.3),
        lambda: setattr(models, "_job", dataclasses.replace(job, template="chat")),
        lambda: tiny_llama(hidden_size=64).save_pretrained(job.model),
    ):
        change()
        made.add(models.baseline("npo"))
        assert models.baseline("npo") in made
    assert len(made) == len(tuned) == 6
    assert tuned[-1][0].objective.beta == 0.5
    assert tuned[-1][1:] == (0.3, 9)
    assert all(folder.name.startswith("baseline-npo-") for folder in made)
