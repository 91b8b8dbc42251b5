"""NLL against what the model's own forward says, for every family and its output head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from libortho.data.tokens import Tokens, collate
from libortho.scoring import (
    answer_probability,
    perplexity,
    predicted_logits,
    sequence_nll,
    token_nll,
)

LENGTHS = [4, 12, 7, 9]


def direct(model: nn.Module, item: Tokens) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([item.ids])).logits[0].double()
    log_p = logits.log_softmax(dim=-1)
    return -torch.stack([log_p[i - 1, item.ids[i]] for i in range(item.prompt, len(item.ids))])


def test_token_nll_of_every_family(family, random_tokens) -> None:
    model = family.build()
    items = random_tokens(LENGTHS, prompt=3)
    batch = collate(items, [2, 0, 3, 1])
    expected = [direct(model, items[i]) for i in batch.index]
    with torch.no_grad():
        nll = token_nll(model, batch)
        logits = predicted_logits(model, batch)
    assert logits.dtype == torch.float32
    assert logits.shape == (sum(n - 3 for n in LENGTHS), 64)
    torch.testing.assert_close(nll.double(), torch.cat(expected), atol=1e-4, rtol=1e-4)
    # Text that says nothing would pass with any head: the family's logits must differ.
    assert torch.cat(expected).std() > 0.1


def test_sequence_nll_keeps_the_order(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    items = random_tokens([12, 4, 9, 4, 7])
    for tokens_per_batch in (1, 16, 1024):
        found = sequence_nll(model, items, tokens_per_batch)
        for nll, item in zip(found, items, strict=True):
            torch.testing.assert_close(nll.double(), direct(model, item), atol=1e-4, rtol=1e-4)


def test_perplexity_and_answer_probability() -> None:
    nll = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0])]
    assert perplexity(nll) == pytest.approx(math.exp(1.5))  # over tokens
    assert answer_probability(nll) == pytest.approx((math.exp(-2) + 1) / 2)  # over sequences


@pytest.mark.parametrize(
    ("ids", "named"), [((1, 64), "64"), ((1, 5, 900), "900"), ((1, -1, 5), "-1")]
)
def test_token_outside_the_vocabulary(tiny_llama, ids: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=rf"token id {named} .*vocabulary of 64"):
        sequence_nll(tiny_llama(), [Tokens(ids)])
