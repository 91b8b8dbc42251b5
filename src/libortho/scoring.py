"""How well a model knows a sequence: the negative log-likelihood of each predicted token.

Logits are formed at predicted positions only; for a small model with a large vocabulary they are
most of the cost.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from libortho.alpha import current_alpha
from libortho.data.tokens import Batch, Tokens, batches
from libortho.devices import device_of
from libortho.layer import OrthoLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATISTICS_ROWS = 64
"""Rows of logits of which the moments are taken at a time: what bounds their memory."""

_NO_LOG_P = -1e4
"""Stands for log 0: exp of it is 0 in fp32, and 0 times it is 0 rather than NaN. An NLL of more
than this, which is a logit that is barred, is reported as this."""

_MOST_NLL = math.log(sys.float_info.max)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """What a model made of each predicted token of one sequence; (targets,) on the CPU each.

    Attributes:
        nll: -log p(token), nats, fp32.
        greedy: whether the token is the model's first choice, bool.
        mean: E[log p(x)] over tokens x drawn from the model's own distribution at this position,
            nats, fp32: minus its entropy.
        variance: Var[log p(x)] over the same, nats squared, fp32.
    """

    nll: Tensor
    greedy: Tensor
    mean: Tensor
    variance: Tensor


def predicted_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits at the positions that predict, (predicted tokens, vocabulary), fp32.

    The output layer is handed those positions alone; whatever else a family does to its logits
    (scaling, soft-capping) is done by the model's own forward. Not for two threads at once.

    Raises:
        ValueError: a token id is beyond the model's vocabulary (the tokenizer of another model), or
            the output layer is split and has one alpha per row.
    """
    check_vocabulary(model, batch)
    head = model.get_output_embeddings()
    if isinstance(head, OrthoLinear) and len(current_alpha(head).rows) > 1:
        raise ValueError(
            "the output layer is split, and is handed positions here, not rows: score at one alpha "
            "at a time"
        )
    device = device_of(head)
    predicts = batch.predicts.to(device)

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][predicts.to(args[0].device)], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        logits = model(
            input_ids=batch.ids.to(device),
            attention_mask=batch.attention.to(device),
            use_cache=False,
        ).logits
    finally:
        handle.remove()
    assert logits.shape[0] == len(batch.labels), (
        "the output layer was not called with all positions"
    )
    return logits.float()


def last_position(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `model`, or its `generate`, is called with to form logits of the last position alone.

    An index, not the number of positions: of a number transformers makes a slice, which is not
    contiguous, and then a matmul copies the whole output layer for every row of the batch.

    Returns:
        {"logits_to_keep": (1,) int64}, or nothing where the model does not take it.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=device_of(model.get_output_embeddings()))}


def context_length(*models: PreTrainedModel | None) -> int:
    """Tokens that all of these models take at once; what one does not say is without limit."""
    told = [getattr(one.config, "max_position_embeddings", None) for one in models if one]
    return min((context for context in told if context), default=sys.maxsize)


def check_vocabulary(model: PreTrainedModel, batch: Batch) -> None:
    """Raise ValueError where an id is outside the model's embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    smallest, largest = int(batch.ids.min()), int(batch.ids.max())
    if smallest < 0 or largest >= rows:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(
            f"token id {wrong} is outside the model's vocabulary of {rows}: "
            "was this text encoded with another model's tokenizer?"
        )


def token_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """NLL of every predicted token of a batch, in nats, (predicted tokens,)."""
    logits = predicted_logits(model, batch)
    return nn.functional.cross_entropy(logits, batch.labels.to(logits.device), reduction="none")


@torch.no_grad()
def sequence_nll(
    model: PreTrainedModel, items: Sequence[Tokens], tokens_per_batch: int = 1024
) -> list[Tensor]:
    """NLL of the predicted tokens of each sequence, in nats: one (targets,) CPU tensor an item."""
    result: dict[int, Tensor] = {}
    for batch in batches(items, tokens_per_batch):
        parts = token_nll(model, batch).cpu().split(batch.counts)
        result.update(zip(batch.index, parts, strict=True))
    return [result[i] for i in range(len(items))]


@torch.no_grad()
def token_statistics(
    model: PreTrainedModel,
    items: Sequence[Tokens],
    tokens_per_batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenStatistics]:
    """Everything token-wise that a metric needs, from one forward pass of each sequence.

    The softmax is taken in fp32 whatever the model's dtype. `sequence_nll` is cheaper where the
    NLL is all that is wanted.

    Args:
        progress: told (sequences done, sequences in all) after each batch.

    Raises:
        ValueError: a token id is beyond the model's vocabulary.
    """
    result: dict[int, TokenStatistics] = {}
    for batch in batches(items, tokens_per_batch):
        logits = predicted_logits(model, batch)
        labels = batch.labels.to(logits.device)
        chunks = [
            torch.stack(_row_statistics(rows, wanted))
            for rows, wanted in zip(
                logits.split(_STATISTICS_ROWS), labels.split(_STATISTICS_ROWS), strict=True
            )
        ]
        parts = torch.cat(chunks, dim=1).cpu().split(batch.counts, dim=1)
        for index, (nll, greedy, mean, variance) in zip(batch.index, parts, strict=True):
            result[index] = TokenStatistics(nll, greedy.bool(), mean, variance)
        if progress is not None:
            progress(len(result), len(items))
    return [result[i] for i in range(len(items))]


def _row_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nll, greedy, mean, variance), (rows,) fp32 each, of (rows, vocabulary) logits."""
    # Half the passes over the vocabulary of the plain formulas: at a small model's size they cost
    # as much as a good part of its forward.
    top = logits.amax(dim=-1)
    shifted = (logits - top[:, None]).clamp_(min=_NO_LOG_P)
    own = shifted.gather(1, labels[:, None]).squeeze(1)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    centre = torch.linalg.vecdot(weights, shifted) / total
    variance = torch.linalg.vecdot(weights, shifted.sub_(centre[:, None]).square_()) / total
    # Of tied logits, which bf16 has, the first is the model's choice.
    greedy = own == 0
    greedy[greedy.clone()] = logits[greedy].argmax(dim=-1) == labels[greedy]
    return total.log() - own, greedy.float(), centre - total.log(), variance


@torch.no_grad()
def mean_token_kl(model: PreTrainedModel, other: PreTrainedModel, items: Sequence[Tokens]) -> float:
    """KL(model || other) of the next-token distributions, nats, mean over predicted tokens."""
    total, tokens = 0.0, 0
    for batch in batches(items):
        one = predicted_logits(model, batch).log_softmax(dim=1)
        two = predicted_logits(other, batch).to(one.device).log_softmax(dim=1)
        total += float(nn.functional.kl_div(two, one, reduction="sum", log_target=True))
        tokens += sum(batch.counts)
    return total / tokens


def perplexity(nll: Sequence[Tensor]) -> float:
    """exp of the mean NLL over all predicted tokens; infinite beyond fp64 (709 nats a token)."""
    mean = float(torch.cat(list(nll)).double().mean())
    return math.inf if mean > _MOST_NLL else math.exp(mean)


def answer_probability(nll: Sequence[Tensor]) -> float:
    """Mean over sequences of P(answer | question)^(1 / tokens) (TOFU, arXiv 2401.06121, eq. 1)."""
    return sum(math.exp(-float(x.double().mean())) for x in nll) / len(nll)
