"""How well a model knows a sequence: the negative log-likelihood of each predicted token.

Logits are formed at predicted positions only; for a small model with a large vocabulary they are
most of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from libortho.data.tokens import Batch, Tokens, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predicted_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits at the positions that predict, (predicted tokens, vocabulary), fp32.

    The output layer is handed those positions alone; whatever else a family does to its logits
    (scaling, soft-capping) is done by the model's own forward. Not for two threads at once.

    Raises:
        ValueError: a token id is beyond the model's vocabulary (the tokenizer of another model).
    """
    check_vocabulary(model, batch)
    head = model.get_output_embeddings()
    device = head.weight.device
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


def perplexity(nll: Sequence[Tensor]) -> float:
    """exp of the mean NLL over all predicted tokens."""
    return math.exp(float(torch.cat(list(nll)).double().mean()))


def answer_probability(nll: Sequence[Tensor]) -> float:
    """Mean over sequences of P(answer | question)^(1 / tokens) (TOFU, arXiv 2401.06121, eq. 1)."""
    return sum(math.exp(-float(x.double().mean())) for x in nll) / len(nll)
