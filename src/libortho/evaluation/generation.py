"""Greedy answers, as a person would see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
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
    generation config says, and the tokenizer's end of sequence.

    Args:
        prompts: token ids; see `libortho.data.tokens.prompt_ids`.
        tokens_per_batch: at most so many tokens, new ones included, are in memory at a time (one
            prompt if it is longer).
        progress: told (prompts done, prompts in all) after each batch.
    """
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
        tails = _continued(model, [prompts[i] for i in rows], max_new_tokens, ends)
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
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: list[int]
) -> Tensor:
    """The new tokens of each prompt, (prompts, new tokens)."""
    pad = ends[0] if ends else 0
    length = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = [[pad] * (length - len(p)) + list(p) for p in prompts]
    attention = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(attention, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )
    return output[:, length:]
