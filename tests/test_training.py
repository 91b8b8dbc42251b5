"""Fine-tuning: it stops when answers are known, and an interrupted one ends where another would."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from libortho import training
from libortho.data.tokens import Tokens
from libortho.scoring import answer_probability, sequence_nll
from libortho.training import (
    MasterWeights,
    MemoriseConfig,
    body_parameters,
    memorise_,
    shuffled_batches,
)

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


@pytest.mark.parametrize("diverges", [False, True])
def test_what_was_trainable_is_so_afterwards(tiny_llama, items, diverges: bool) -> None:
    model = tiny_llama().requires_grad_(True)
    model.lm_head.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(set(before.values())) == 2
    if diverges:
        model.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="training diverged"):
            memorise_(model, items, RECIPE)
    else:
        memorise_(model, items, RECIPE)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(p.grad is not None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"target": 88}, "target=88: expected a fraction"),
        ({"max_epochs": 0}, "max_epochs=0: expected an integer >= 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a finite number > 0"),
        ({"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
    ],
)
def test_a_recipe_that_cannot_be_followed(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MemoriseConfig(**wrong)


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


def test_dropout_goes_on_too_and_leaves_the_callers_draws_alone(
    items, tmp_path: Path, monkeypatch
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    start = GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=2, **shape))
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def killed_in_epoch_three(stage: str, done: int, total: int) -> None:
        if stage.startswith("epoch 3"):
            raise KeyboardInterrupt

    whole, resumed, other = (copy.deepcopy(start) for _ in range(3))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    memorise_(whole, items, RECIPE)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(KeyboardInterrupt):
        memorise_(copy.deepcopy(start), items, RECIPE, killed_in_epoch_three, tmp_path / "state")
    memorise_(resumed, items, RECIPE, state=tmp_path / "state")
    memorise_(other, items, dataclasses.replace(RECIPE, seed=1))
    pairs = list(zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(one, same) for one, same in pairs)
    assert not torch.equal(
        whole.transformer.h[0].mlp.c_fc.weight, other.transformer.h[0].mlp.c_fc.weight
    )


def test_without_a_state_nothing_is_written(tiny_llama, items, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    memorise_(tiny_llama(), items, RECIPE)
    assert not list(tmp_path.iterdir())


def test_master_weights_step_as_fp32_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 4, generator=generator)
    weight, plain = nn.Parameter(start.bfloat16()), nn.Parameter(start.bfloat16().float())
    masters = MasterWeights([weight])
    optimizer = torch.optim.AdamW([plain], weight_decay=0.0)
    for step in range(20):
        gradient = torch.randn(8, 4, generator=generator).bfloat16()
        weight.grad, plain.grad = gradient.clone(), gradient.float()
        # Far below what a step must be to show in bf16: without masters nothing would move.
        optimizer.param_groups[0]["lr"] = rate = 2e-4 if step % 2 else 1e-4
        nn.utils.clip_grad_norm_([plain], 1.0)
        optimizer.step()
        masters.step(rate)
        assert weight.grad is None
    torch.testing.assert_close(weight.detach(), plain.detach().bfloat16(), rtol=8e-3, atol=1e-6)
    assert not torch.equal(weight, start.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_is_refused_and_nothing_moves(bad: float) -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    masters = MasterWeights([first, second])
    first.grad, second.grad = torch.ones(3), torch.tensor([1.0, bad])
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is (nan|inf)"):
        masters.step(0.1)
    assert torch.equal(first, torch.ones(3))
    assert torch.equal(second, torch.ones(2))
    assert first.grad is None
    assert second.grad is None


@pytest.mark.parametrize("tied", [False, True])
def test_body_parameters_leave_the_embedding_out(tiny_llama, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    chosen = {id(p) for p in body_parameters(model)}
    left = {name for name, p in model.named_parameters() if id(p) not in chosen}
    assert left == {"model.embed_tokens.weight"}
    assert (id(model.lm_head.weight) in chosen) == (not tied)


def test_shuffled_batches_hold_every_item_once(random_tokens) -> None:
    items = random_tokens(range(4, 41), prompt=2)
    order = random.Random(0)
    epochs = [shuffled_batches(items, 4, order) for _ in range(2)]
    for batches in epochs:
        assert sorted(i for rows in batches for i in rows) == list(range(37))
        assert sorted(map(len, batches)) == [1, *[4] * 9]
    assert epochs[0] != epochs[1]
    assert epochs[0] == shuffled_batches(items, 4, random.Random(0))
