"""experiments/run_tofu_eval.py: what its options reach."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import load_benchmark


class Stop(Exception):
    """Raised where the split would begin."""


def test_the_seed_is_the_methods(monkeypatch, tiny_llama, tokenizer) -> None:
    experiment = load_benchmark("run_tofu_eval", monkeypatch, "experiments")
    seeds: list[int] = []

    def noted(model: Any, forget: Any, retain: Any, config: Any, **_: Any) -> None:
        seeds.append(config.method.seed)
        raise Stop

    monkeypatch.setattr(experiment, "separate_", noted)
    for name in experiment.METHODS:
        with pytest.raises(Stop):
            experiment.run_method(
                name, tiny_llama(), tokenizer, "a secret", ("down_proj",), lambda *_: None, 7
            )
    assert seeds == [7] * len(experiment.METHODS)
