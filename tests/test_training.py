"""The pieces of a fine-tune that several recipes share."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from libortho.training import MasterWeights, body_parameters, shuffled_batches


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
