"""Answers: batched or one by one the same, and ended where a sequence ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from libortho.data.examples import Example
from libortho.data.tokens import encode, prompt_ids
from libortho.evaluation.generation import greedy, sampled

PROMPTS = ["who is she ?", "where", "who wrote the red house in the garden ?", "it is", "a red"]


def by_hand(model: nn.Module, prompt: tuple[int, ...], ends: set[int], steps: int) -> list[int]:
    """One token at a time, without padding or a cache."""
    said: list[int] = []
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 8192])
def test_batches_change_nothing(tiny_llama, tokenizer, tokens_per_batch: int) -> None:
    model = tiny_llama(vocab_size=len(tokenizer))
    prompts = [prompt_ids(text, "plain", tokenizer) for text in PROMPTS]
    done: list[tuple[int, int]] = []
    answers = greedy(
        model,
        tokenizer,
        prompts,
        12,
        tokens_per_batch=tokens_per_batch,
        progress=lambda *at: done.append(at),
    )
    expected = [
        tokenizer.decode(by_hand(model, prompt, {2}, 12), skip_special_tokens=True).strip()
        for prompt in prompts
    ]
    assert answers == expected
    assert len(set(answers)) > 2
    assert done[-1] == (5, 5)
    assert len(done) == {1: 5, 64: 2, 8192: 1}[tokens_per_batch]


def test_ends_where_either_says_so(tiny_llama, tokenizer) -> None:
    """An end that only the tokenizer knows, and one that only the generation config knows."""
    model = tiny_llama(vocab_size=len(tokenizer))
    prompt = prompt_ids("who is she ?", "plain", tokenizer)
    free = by_hand(model, prompt, set(), 12)
    last = free[3]
    assert last not in free[:3]
    expected = [tokenizer.decode(free[:3], skip_special_tokens=True)]
    for configured in (last, [2, last]):
        model.generation_config.eos_token_id = configured
        assert greedy(model, tokenizer, [prompt], 12) == expected
    model.generation_config.eos_token_id = None
    own = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
    try:
        assert greedy(model, tokenizer, [prompt], 12) == expected
    finally:
        tokenizer.eos_token = own


def test_a_prompt_is_what_an_answer_follows(tokenizer) -> None:
    for template in ("plain", "chat"):
        item = encode(Example("a red house", "where is it ?"), tokenizer, template)
        assert item.ids[: item.prompt] == prompt_ids("where is it ?", template, tokenizer)


def test_no_prompts(tiny_llama, tokenizer) -> None:
    assert greedy(tiny_llama(), tokenizer, [], 4) == []


def test_cold_samples_are_greedy(tiny_llama, tokenizer) -> None:
    model = tiny_llama(vocab_size=len(tokenizer))
    prompts = [prompt_ids(text, "plain", tokenizer) for text in PROMPTS]
    drawn = sampled(model, tokenizer, prompts, 6, 2, temperature=1e-4)
    assert drawn == [[answer] * 2 for answer in greedy(model, tokenizer, prompts, 6)]


def test_samples_follow_the_whole_distribution(tiny_llama, tokenizer) -> None:
    """Whatever the generation config would cut off."""
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1
    model.generation_config.eos_token_id = None
    prompt = prompt_ids("who is she ?", "plain", tokenizer)
    temperature, count = 2.0, 4000
    logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    expected = (logits / temperature).softmax(0)
    drawn = sampled(model, tokenizer, [prompt], 1, count, temperature=temperature, seed=3)[0]
    for word in ("red", "house", "she", ":"):
        p = float(expected[tokenizer.convert_tokens_to_ids(word)])
        share = drawn.count(word) / count
        assert abs(share - p) <= 4 * (p * (1 - p) / count) ** 0.5 + 1e-9, word


def test_a_seed_gives_the_same_samples_and_disturbs_nothing(tiny_llama, tokenizer) -> None:
    model = tiny_llama(vocab_size=len(tokenizer))
    prompts = [prompt_ids(text, "plain", tokenizer) for text in PROMPTS[:2]]
    state = torch.get_rng_state()
    first = sampled(model, tokenizer, prompts, 5, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(answers) for answers in first] == [3, 3]
    assert sampled(model, tokenizer, prompts, 5, 3, seed=1) == first
    assert sampled(model, tokenizer, prompts, 5, 3, seed=2) != first
    for change in ({"temperature": 0.0}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            sampled(model, tokenizer, prompts, 5, **{"samples": 3, **change})


@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 3},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"suppress_tokens": [5, 6, 7, 8]},
    ],
)
def test_a_models_habits_have_no_part(tiny_llama, tokenizer, habit: dict[str, object]) -> None:
    """Greedy is the likeliest token, and a sample is drawn from the whole distribution."""
    prompts = [prompt_ids(text, "plain", tokenizer) for text in PROMPTS]
    answers = []
    for config in ({}, habit):
        model = tiny_llama(vocab_size=len(tokenizer))
        for name, value in config.items():
            setattr(model.generation_config, name, value)
        held = model.generation_config
        answers.append(
            (greedy(model, tokenizer, prompts, 12), sampled(model, tokenizer, prompts, 12, 2))
        )
        assert model.generation_config is held
    assert answers[0] == answers[1]
