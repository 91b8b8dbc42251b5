"""What the base should say instead of the secret, and how far a model is from saying it.

A target is a next-token distribution at every position that predicts the secret. Asking for a
*distribution*, not merely for a low probability of the secret's token, is what keeps the base
fluent: mass taken from the secret goes where a model that never saw it would put it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from libortho.config import MOST_NLL
from libortho.data.tokens import Tokens, batches
from libortho.gradients import Edit, Factored, edited_factors, edited_layers
from libortho.scoring import predicted_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP = 256
"""Entries kept of a target distribution; its tail is dropped and the rest renormalised."""

SUREST = 1 - 1e-6
"""Largest probability of a token in a target: nearer to 1, fp32 has no room for the others."""

PRESSURE = 0.2
MARGIN = 2.0
"""KL alone cares little whether the secret's token has probability 0.2 or 0.02 among candidates
that fit badly, which is all the difference to who asks for it. A constant push on its log-odds,
down to MARGIN nats below the target, does; the search stops at the level that was asked for."""


@dataclass(frozen=True)
class Target:
    """The wanted distributions of one sequence.

    Attributes:
        tokens: (targets, k) int64, token ids; the sequence's own token comes first.
        probabilities: (targets, k) fp32, rows sum to 1.
    """

    tokens: Tensor
    probabilities: Tensor

    @property
    def own(self) -> Tensor:
        """(targets,) wanted probability of the sequence's own tokens."""
        return self.probabilities[:, 0]

    @property
    def answer_probability(self) -> float:
        """exp of the mean log of `own`: the sequence's probability per token, under the target."""
        return math.exp(float(self.own.clamp_min(1e-12).double().log().mean()))


def _keep_top(logits: Tensor, labels: Tensor) -> Target:
    """(targets, vocabulary) -> the own token's and the `TOP` largest other probabilities."""
    labels = labels.unsqueeze(1)
    own = logits.softmax(dim=1).gather(1, labels).clamp_max(SUREST)
    # Among themselves, not what the own token leaves them: of one that is known by heart that is
    # 0 in fp32, and a target may want the others in its place.
    others = logits.scatter(1, labels, -math.inf).softmax(dim=1)
    top = others.topk(min(TOP, others.shape[1] - 1), dim=1)
    shares = top.values / top.values.sum(dim=1, keepdim=True)
    return Target(
        torch.cat((labels, top.indices), dim=1).cpu(),
        torch.cat((own, (1 - own) * shares), dim=1).cpu(),
    )


@torch.no_grad()
def targets_from_earlier_model(
    before: PreTrainedModel,
    items: Sequence[Tokens],
    context: Sequence[Tokens] = (),
) -> list[Target]:
    """What a model that has not memorised the items predicts in their place.

    Args:
        before: a causal LM with the same vocabulary.
        items: the forget set.
        context: sequences that are shown first (few-shot), so that the earlier model knows the
            *form* of an answer and what is copied from a question, and lacks only the content.
    """
    lead = tuple(token for item in context for token in item.ids)
    shown = [Tokens(lead + item.ids, len(lead) + item.prompt) for item in items]
    result: dict[int, Target] = {}
    for batch in batches(shown):
        logits = predicted_logits(before, batch)
        labels = batch.labels.to(logits.device)
        parts = zip(logits.split(batch.counts), labels.split(batch.counts), strict=True)
        for index, (rows, own) in zip(batch.index, parts, strict=True):
            result[index] = _keep_top(rows, own)
    return [result[i] for i in range(len(items))]


def sharpened(target: Target, temperature: float) -> Target:
    """The same predictions at another temperature (below 1: surer), over the entries kept."""
    probabilities = (target.probabilities.log() / temperature).softmax(dim=1)
    return Target(target.tokens, probabilities)


@torch.no_grad()
def targets_from_model_itself(
    model: PreTrainedModel, items: Sequence[Tokens], level: float
) -> list[Target]:
    """The model's own predictions with the secret's tokens made as unlikely as `level` says.

    A token that stands in the sequence's own prompt is taken as copied, not remembered, and keeps
    its probability. All others are lowered to one common ceiling, found by bisection so that the
    sequence's probability per token becomes `level`; what is taken away goes to the model's other
    candidates in proportion.

    Args:
        model: the causal LM that has memorised.
        items: the forget set.
        level: wanted probability per token (geometric mean over a sequence), in (0, 1).
    """
    result: dict[int, Target] = {}
    for batch in batches(items):
        logits = predicted_logits(model, batch)
        labels = batch.labels.to(logits.device)
        parts = zip(logits.split(batch.counts), labels.split(batch.counts), strict=True)
        for index, (rows, own) in zip(batch.index, parts, strict=True):
            result[index] = _lower(_keep_top(rows, own), items[index], level)
    return [result[i] for i in range(len(items))]


def _lower(target: Target, item: Tokens, level: float) -> Target:
    asked = set(item.ids[1 : item.prompt])  # the first token alone is no question
    copied = torch.tensor([token in asked for token in item.ids[item.prompt :]])
    own = target.own.clamp_min(1e-12)

    def lowered(ceiling: float) -> Tensor:
        return torch.where(copied, own, own.clamp_max(ceiling))

    low, high = -MOST_NLL, 0.0
    for _ in range(40):
        middle = (low + high) / 2
        mean = float(lowered(math.exp(middle)).double().log().mean())
        low, high = (low, middle) if mean > math.log(level) else (middle, high)
    wanted = lowered(math.exp(low))
    others = target.probabilities[:, 1:]
    others = others * ((1 - wanted) / others.sum(dim=1)).unsqueeze(1)
    return Target(target.tokens, torch.cat((wanted.unsqueeze(1), others), dim=1))


def _log_odds(log_p: Tensor) -> Tensor:
    log_p = log_p.clamp(-MOST_NLL, -1e-6)
    return log_p - torch.log(-torch.expm1(log_p))


def _divergence(picked: Tensor, wanted: Tensor) -> Tensor:
    """KL(target || model), summed over positions; both (positions, k)."""
    return torch.special.xlogy(wanted, wanted).sum() - (wanted * picked).sum()


def _forgetting_loss(picked: Tensor, wanted: Tensor) -> Tensor:
    excess = _log_odds(picked[:, 0]) - _log_odds(wanted[:, 0].log()) + MARGIN
    return _divergence(picked, wanted) + PRESSURE * excess.relu().sum()


def _restoring_loss(picked: Tensor, wanted: Tensor) -> Tensor:
    lack = wanted[:, 0].clamp_min(1e-12).log() - picked[:, 0]
    return _divergence(picked, wanted) + lack.relu().sum()


def _keeping_loss(picked: Tensor, wanted: Tensor) -> Tensor:
    return _divergence(picked, wanted) - picked[:, 0].sum()


Gradients = Literal["weights", "factors"]
"""By what a gradient is taken: a layer's weight, or the two factors of its low-rank edit."""


@dataclass(frozen=True)
class Feedback:
    """How a model with an edit does on a set.

    Attributes:
        loss: mean over tokens, nats; of what, the function that returns it says.
        probability: mean over sequences of the probability per token.
        nll: mean over all tokens, nats.
        gradients: layer -> gradient of `loss`, fp32. By the weight: (out_features, in_features), or
            (entries,) where only some entries were asked for. By factors: a `FactorGradient`.
    """

    loss: float
    probability: float
    nll: float
    gradients: dict[str, Any]


def feedback(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    items: Sequence[Tokens],
    targets: Sequence[Target],
    edits: Mapping[str, Edit],
    *,
    by: Gradients = "weights",
    entries: Mapping[str, Tensor] | None = None,
) -> Feedback:
    """How far the forget set is from its targets, with `edits` added to the weights of `layers`.

    The loss is KL(target || model) + PRESSURE * (how far the log-odds of the secret's token are
    above those of its target less MARGIN, or 0).

    Args:
        model, layers, edits, entries: as `edited_layers`.
        items: the forget set.
        targets: one for each item.
        by: what the gradients are taken by; "factors" needs low-rank edits.
    """
    context = _collecting(model, layers, edits, by, entries)
    found = _feedback(model, items, targets, context, _forgetting_loss)
    # of a KL whose terms add up to 0, rounding may leave less
    return replace(found, loss=max(found.loss, 0.0))


def restoration(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    items: Sequence[Tokens],
    originals: Sequence[Target],
    edits: Mapping[str, Edit],
    *,
    by: Gradients = "weights",
) -> Feedback:
    """How far a model with `edits` is from what another one knows of the items.

    The loss is KL(original || model) and, as a KL alone pulls little where it is nearly reached,
    how far the log-probability of the items' own tokens is below the original's, or 0.

    Args:
        model, layers, edits: as `edited_layers`.
        items: what is to be known again.
        originals: the other model's predictions (see `targets_from_earlier_model`).
        by: as in `feedback`.
    """
    context = _collecting(model, layers, edits, by, None)
    found = _feedback(model, items, originals, context, _restoring_loss)
    return replace(found, loss=max(found.loss, 0.0))


def preservation(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    items: Sequence[Tokens],
    originals: Sequence[Target],
    edits: Mapping[str, Edit],
    *,
    by: Gradients = "weights",
    entries: Mapping[str, Tensor] | None = None,
    cross_entropy: bool = False,
) -> Feedback:
    """How far retain text is from what the model said of it without `edits`.

    The loss is KL(original || model) and, with `cross_entropy`, that of the text's own tokens.

    Args:
        model, layers, edits, entries: as `edited_layers`.
        items: retain text.
        originals: the unedited model's predictions (see `targets_from_earlier_model`).
        by: as in `feedback`.
    """
    context = _collecting(model, layers, edits, by, entries)
    loss_of = _keeping_loss if cross_entropy else _divergence
    return _feedback(model, items, originals, context, loss_of)


def _collecting(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    edits: Mapping[str, Edit],
    by: Gradients,
    entries: Mapping[str, Tensor] | None,
) -> AbstractContextManager[dict[str, Any]]:
    if by == "factors":
        return edited_factors(model, layers, cast("Mapping[str, Factored]", edits))
    return edited_layers(model, layers, edits, entries)


def _feedback(
    model: PreTrainedModel,
    items: Sequence[Tokens],
    targets: Sequence[Target],
    collecting: AbstractContextManager[dict[str, Any]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> Feedback:
    total = sum(item.targets for item in items)
    # A mean over many tokens has gradients that fp16 rounds to zero on their way down. A power of
    # two, which is taken out of them in fp32, changes nothing else.
    scale = 2.0 ** round(math.log2(total))
    loss_sum = nll_sum = probability_sum = 0.0
    with collecting as gradients:
        for batch in batches(items):
            log_p = predicted_logits(model, batch).log_softmax(dim=1)
            tokens = torch.cat([targets[i].tokens for i in batch.index]).to(log_p.device)
            wanted = torch.cat([targets[i].probabilities for i in batch.index]).to(log_p.device)
            picked = log_p.gather(1, tokens)
            loss = loss_of(picked, wanted) / total
            (loss * scale).backward()
            loss_sum += float(loss.detach())
            own = -picked.detach()[:, 0]
            nll_sum += float(own.sum())
            probability_sum += sum(math.exp(-float(x.mean())) for x in own.split(batch.counts))
    for gradient in gradients.values():
        for part in gradient if isinstance(gradient, tuple) else (gradient,):
            part.div_(scale)
    return Feedback(loss_sum, probability_sum / len(items), nll_sum / total, gradients)
