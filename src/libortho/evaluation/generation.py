"""Greedy answers, as a person would see them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> str:
    """The greedy continuation of a prompt, without special tokens."""
    given = tokenizer(prompt, return_tensors="pt")
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(  # type: ignore[operator]
        input_ids=given.input_ids.to(device),
        attention_mask=given.attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
    )
    tail = output[0][given.input_ids.shape[1] :]
    return str(tokenizer.decode(tail, skip_special_tokens=True)).strip()
