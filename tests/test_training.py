"""Fine-tuning: it stops when answers are known, and an interrupted one ends where another would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from libortho import training
from libortho.data.tokens import Tokens
from libortho.scoring import answer_probability, sequence_nll
from libortho.training import MemoriseConfig, memorise_

RECIPE = MemoriseConfig(target=0.999, max_epochs=6, learning_rate=5e-3, batch_size=2)


@pytest.fixture
def items() -> list[Tokens]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(3, 60, (5, 7), generator=generator).tolist()
    return [Tokens(tuple(ids), 2) for ids in drawn]


def test_it_stops_when_the_answers_are_known(tiny_llama, items) -> None:
    model = tiny_llama()
    recipe = MemoriseConfig(target=0.5, max_epochs=200, learning_rate=5e-3, batch_size=2)
    assert memorise_(model, items, recipe) < 200
    assert answer_probability(sequence_nll(model, items)) > 0.5


def test_an_interrupted_fine_tune_ends_where_another_would(
    tiny_llama, items, tmp_path: Path, monkeypatch
) -> None:
    whole = tiny_llama()
    assert memorise_(whole, items, RECIPE) == 6

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    state = tmp_path / "deep" / "state"

    def killed_in_epoch_four(stage: str, done: int, total: int) -> None:
        if stage.startswith("epoch 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memorise_(tiny_llama(), items, RECIPE, killed_in_epoch_four, state)
    assert [f.name for f in state.parent.iterdir()] == ["state"]

    stages: list[str] = []
    resumed = tiny_llama()
    epochs = memorise_(resumed, items, RECIPE, lambda stage, *_: stages.append(stage), state)
    assert epochs == 6
    assert {stage.split(",")[0] for stage in stages} == {"epoch 4", "epoch 5", "epoch 6"}
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_a_state_nothing_is_written(tiny_llama, items, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    memorise_(tiny_llama(), items, RECIPE)
    assert not list(tmp_path.iterdir())
