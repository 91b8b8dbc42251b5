"""Greedy answers, as a person would see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt, without special tokens; one batch, padded left."""
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    length = max(map(len, encoded))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (length - len(e)) + e for e in encoded], device=device)
    attention = torch.tensor(
        [[0] * (length - len(e)) + [1] * len(e) for e in encoded], device=device
    )
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=attention,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
    )
    tails = output[:, length:]
    return [str(tokenizer.decode(tail, skip_special_tokens=True)).strip() for tail in tails]
