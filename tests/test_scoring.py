"""NLL against what the model's own forward says, for every family and its output head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from libortho import alpha_scope, replace_linear_layers
from libortho.data.tokens import Tokens, collate
from libortho.scoring import (
    answer_probability,
    last_position,
    perplexity,
    predicted_logits,
    sequence_nll,
    token_nll,
    token_statistics,
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


def test_a_split_output_layer(tiny_llama, random_tokens) -> None:
    model = replace_linear_layers(tiny_llama(), "lm_head", use_low_rank=False, scale="absmax")
    items = random_tokens(LENGTHS)
    with alpha_scope(model, 1.0):
        found = torch.cat(sequence_nll(model, items))
    expected = torch.cat([direct(tiny_llama(), item) for item in items])
    torch.testing.assert_close(found.double(), expected, atol=0.1, rtol=0.05)
    # It is handed positions, among which a row's alpha could not be told from another's.
    with pytest.raises(ValueError, match="one alpha"), alpha_scope(model, [0.0, 1.0]):
        sequence_nll(model, items)


def test_last_position_of_every_family(family) -> None:
    model = family.build()
    more = last_position(model)
    assert list(more) == ["logits_to_keep"]
    ids = torch.randint(3, 64, (3, 9))
    handed: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: handed.append(args[0]))
    with torch.no_grad():
        found = model(input_ids=ids, **more).logits
        hook.remove()
        expected = model(input_ids=ids).logits[:, -1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # Else a matmul copies the layer's weight for every row.
    assert handed[0].shape[:2] == (3, 1)
    assert handed[0].is_contiguous()


def test_last_position_of_a_model_that_cannot_choose(tiny_llama) -> None:
    class Old(type(tiny_llama())):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    model = Old(tiny_llama().config)
    assert last_position(model) == {}


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
    # A barred token, or a model that gradient ascent has wrecked: a number, not an error.
    assert perplexity([torch.tensor([1e4, 0.0])]) == math.inf
    assert math.isnan(perplexity([torch.tensor([math.nan])]))
    assert answer_probability(nll) == pytest.approx((math.exp(-2) + 1) / 2)  # over sequences


@pytest.mark.parametrize(
    ("ids", "named"), [((1, 64), "64"), ((1, 5, 900), "900"), ((1, -1, 5), "-1")]
)
def test_token_outside_the_vocabulary(tiny_llama, ids: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=rf"token id {named} .*vocabulary of 64"):
        sequence_nll(tiny_llama(), [Tokens(ids)])


def test_token_statistics_of_every_family(family, random_tokens) -> None:
    model = family.build()
    items = random_tokens(LENGTHS, prompt=3)
    found = token_statistics(model, items, tokens_per_batch=24)
    for statistics, item in zip(found, items, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item.ids])).logits[0].double()
        log_p = logits.log_softmax(dim=-1)[item.prompt - 1 : -1]
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        variance = (p * log_p.square()).sum(-1) - mean.square()
        labels = torch.tensor(item.ids[item.prompt :])
        for name, expected in (
            ("nll", direct(model, item)),
            ("mean", mean),
            ("variance", variance),
        ):
            value = getattr(statistics, name)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, atol=2e-4, rtol=1e-3, msg=name)
        assert statistics.greedy.tolist() == (log_p.argmax(-1) == labels).tolist()
        assert variance.min() > 1e-3  # a flat distribution would pass with anything


def test_token_statistics_knows_a_hit(memorised) -> None:
    """What a model recites are its first choices; of what it has never seen, few are."""
    known = token_statistics(memorised.model, memorised.forget)
    unseen = token_statistics(memorised.model, memorised.unseen)
    # The first target follows a token that begins several of the sequences.
    assert all(bool(s.greedy[1:].all()) for s in known)
    assert float(torch.cat([s.greedy for s in unseen]).float().mean()) < 0.5


def test_token_statistics_in_chunks_and_batches(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    items = random_tokens([40, 3, 40, 9, 40])  # more rows than one chunk
    whole = token_statistics(model, items, 1024)
    for statistics, nll in zip(whole, sequence_nll(model, items), strict=True):
        torch.testing.assert_close(statistics.nll, nll, atol=1e-5, rtol=1e-5)
    for statistics, other in zip(whole, token_statistics(model, items, 1), strict=True):
        for name in ("nll", "mean", "variance"):
            torch.testing.assert_close(
                getattr(statistics, name), getattr(other, name), atol=1e-4, rtol=1e-4
            )
        assert torch.equal(statistics.greedy, other.greedy)


def test_token_statistics_where_a_token_is_impossible(tiny_llama, random_tokens) -> None:
    """A model that bars tokens (logit -inf) has finite moments: 0 log 0 is 0."""
    model = tiny_llama()
    items = random_tokens([8])
    expected = token_statistics(model, items)[0]
    barred = sorted(set(range(64)) - set(items[0].ids))[:5]
    head = model.get_output_embeddings()

    def bar(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits[..., barred] = float("-inf")
        return logits

    handle = head.register_forward_hook(bar)
    found = token_statistics(model, items)[0]
    handle.remove()
    assert bool(found.mean.isfinite().all() and found.variance.isfinite().all())
    assert bool((found.nll < expected.nll).all())  # the others share what the barred ones had


def test_of_tied_logits_the_first_is_the_choice(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    items = random_tokens([6])
    item = items[0]

    def tie(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return torch.zeros_like(logits)

    handle = model.get_output_embeddings().register_forward_hook(tie)
    (found,) = token_statistics(model, items)
    (first,) = token_statistics(model, [Tokens((1, 5, 0, 0), 2)])
    handle.remove()
    assert 0 not in item.ids
    assert not bool(found.greedy.any())
    assert bool(first.greedy.all())
    uniform = torch.full_like(found.nll, math.log(64))
    torch.testing.assert_close(found.nll, uniform)
    torch.testing.assert_close(found.mean, -uniform)
    torch.testing.assert_close(found.variance, torch.zeros_like(uniform), atol=1e-9, rtol=0)
