"""How well a model knows a sequence: the negative log-likelihood of each predicted token.

Logits are formed at predicted positions only; for a small model with a large vocabulary they are
most of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from libortho.data.tokens import Batch, Tokens, batches


def predicted_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the positions that predict, (predicted tokens, vocabulary), fp32.

    Raises:
        ValueError: a token id is beyond the model's vocabulary (the tokenizer of another model).
    """
    check_vocabulary(model, batch)
    device = next(model.parameters()).device
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    head = model.get_output_embeddings()
    ids, attention = batch.ids.to(device), batch.attention.to(device)
    predicts = batch.predicts.to(device)
    if decoder is not None and decoder is not model and _plain_head(model, head):
        hidden = decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        return head(hidden[predicts]).float()
    return model(input_ids=ids, attention_mask=attention, use_cache=False).logits[predicts].float()


def _plain_head(model: nn.Module, head: nn.Module | None) -> bool:
    # Some families do more between the decoder and the logits than one linear layer: scaling
    # (Granite, Cohere), soft-capping (Gemma 2). For those the model's own forward is asked.
    config = model.config
    special = ("final_logit_softcapping", "logit_scale", "logits_scaling", "word_embed_proj_dim")
    return isinstance(head, nn.Linear) and not any(
        getattr(config, name, None) not in (None, getattr(config, "hidden_size", None))
        for name in special
    )


def check_vocabulary(model: nn.Module, batch: Batch) -> None:
    """Raise ValueError where an id is outside the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = int(batch.ids.max())
    if largest >= rows or int(batch.ids.min()) < 0:
        raise ValueError(
            f"token id {largest} is outside the model's vocabulary of {rows}: "
            "was this text encoded with another model's tokenizer?"
        )


def token_nll(model: nn.Module, batch: Batch) -> Tensor:
    """NLL of every predicted token of a batch, in nats, (predicted tokens,)."""
    logits = predicted_logits(model, batch)
    return nn.functional.cross_entropy(logits, batch.labels.to(logits.device), reduction="none")


@torch.no_grad()
def sequence_nll(
    model: nn.Module, items: Sequence[Tokens], tokens_per_batch: int = 1024
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
