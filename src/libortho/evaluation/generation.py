"""Answers, greedy or sampled, as a person would see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from libortho.config import check_count, check_positive
from libortho.linalg import seeded
from libortho.scoring import last_position


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    tokens_per_batch: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, up to an end of sequence, without special tokens.

    Prompts of similar length share a batch, padded left. What ends a sequence is what the model's
    generation config says, and the tokenizer's end of sequence. Nothing else of that config has a
    part: its repetition penalty, which OpenUnlearning leaves in force, would keep an answer from
    the words of its question.

    Args:
        prompts: token ids; see `libortho.data.tokens.prompt_ids`.
        tokens_per_batch: at most so many tokens, new ones included, are in memory at a time (one
            prompt if it is longer).
        progress: told (prompts done, prompts in all) after each batch.
    """
    return _answers(model, tokenizer, prompts, max_new_tokens, None, tokens_per_batch, progress)


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samples: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    tokens_per_batch: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """`samples` continuations of each prompt, drawn from the model's whole distribution.

    As `greedy` otherwise; neither top-k nor top-p. The caller's random state is left alone.

    Args:
        temperature: > 0; 1 is the model's own distribution.
        seed: of the draws. What is drawn also depends on how prompts fall into batches.

    Raises:
        ValueError: `temperature` or `samples` is out of range.
    """
    check_positive("temperature", temperature)
    check_count("samples", samples, 1)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    with seeded(seed, *{p.device for p in model.parameters()}):
        said = _answers(
            model, tokenizer, repeated, max_new_tokens, temperature, tokens_per_batch, progress
        )
    return [said[i : i + samples] for i in range(0, len(said), samples)]


@torch.no_grad()
def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float | None,
    tokens_per_batch: int,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    ends = end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, str] = {}
    while order:
        rows: list[int] = []
        while order and (
            not rows
            or (len(rows) + 1) * (len(prompts[order[0]]) + max_new_tokens) <= tokens_per_batch
        ):
            rows.append(order.pop(0))
        tails = _continued(model, [prompts[i] for i in rows], max_new_tokens, ends, temperature)
        for i, tail in zip(rows, tails.tolist(), strict=True):
            stop = next((at for at, token in enumerate(tail) if token in ends), len(tail))
            answers[i] = str(tokenizer.decode(tail[:stop], skip_special_tokens=True)).strip()
        if progress is not None:
            progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the generation config's, and the tokenizer's end of sequence."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None})


def _continued(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: list[int],
    temperature: float | None,
) -> Tensor:
    """The new tokens of each prompt, (prompts, new tokens)."""
    pad = ends[0] if ends else 0
    length = max(map(len, prompts))
    device = next(model.parameters()).device
    sampling: dict[str, bool | float] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids = [[pad] * (length - len(p)) + list(p) for p in prompts]
    attention = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    with _plain_generation(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(attention, device=device),
            max_new_tokens=max_new_tokens,
            **sampling,
            eos_token_id=ends or None,
            pad_token_id=pad,
            **last_position(model),
        )
    return output[:, length:]


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's generation config, which may penalise, bar or cut off tokens."""
    held = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = held
