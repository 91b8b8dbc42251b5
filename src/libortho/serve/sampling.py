"""The next token of every row of a batch, each by its own rule and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_LOGPROB = -9999.0
"""Stands for log 0, for which JSON has no number."""


@dataclass(frozen=True)
class Rule:
    """How one row chooses.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that together have at least this probability may be drawn.
        generator: this row's own random numbers, so that a seed repeats an answer whatever else
            is in the batch.
        logprobs: None, or the number of alternatives to report beside the token's own.
    """

    temperature: float
    top_p: float
    generator: torch.Generator
    logprobs: int | None


@dataclass(frozen=True)
class Chosen:
    """A row's next token.

    Attributes:
        token: its id.
        logprob: its log-probability at temperature 1, nats, where asked for.
        top: (id, log-probability) of the likeliest tokens, where asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, rules: Sequence[Rule]) -> list[Chosen]:
    """The next token of each row.

    Args:
        logits: (rows, vocabulary), floating.
        rules: one for each row.

    Raises:
        ValueError: a row's logits hold NaN.
    """
    logits = logits.float().cpu()
    if bool(logits.isnan().any()):
        raise ValueError("the model's logits hold NaN")
    greedy = logits.argmax(dim=-1).tolist()
    chosen = []
    for row, rule in enumerate(rules):
        token = greedy[row] if rule.temperature == 0 else _draw(logits[row], rule)
        if rule.logprobs is None:
            chosen.append(Chosen(token))
            continue
        logprobs = logits[row].log_softmax(dim=-1).clamp_min(LEAST_LOGPROB)
        best = logprobs.topk(min(rule.logprobs, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        chosen.append(Chosen(token, float(logprobs[token]), top))
    return chosen


def _draw(logits: Tensor, rule: Rule) -> int:
    # The largest logit is taken off first: a tiny temperature must not overflow to inf - inf. One
    # that fp32 does not tell from 0 would make 0 / 0, and end the whole batch.
    smallest = torch.finfo(logits.dtype).tiny
    scaled = (logits - logits.max()) / max(rule.temperature, smallest)
    probability = scaled.softmax(dim=-1)
    if rule.top_p < 1:
        ordered, index = probability.sort(descending=True)
        # Those before which less than top_p has been gathered: at least the first.
        keep = ordered.cumsum(dim=-1) - ordered < rule.top_p
        keep[0] = True
        place = torch.multinomial(ordered * keep, 1, generator=rule.generator)
        return int(index[place])
    return int(torch.multinomial(probability, 1, generator=rule.generator))
