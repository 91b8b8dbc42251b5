"""What the base should say instead of the secret, and how far a model is from saying it.

A target is a next-token distribution at every position that predicts the secret. Asking for a
*distribution*, not merely for a low probability of the secret's token, is what keeps the base
fluent: mass taken from the secret goes where a model that never saw it would put it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from libortho.calibration import matmul_precision
from libortho.data.tokens import Tokens, batches
from libortho.methods.geometric import LowRankEdit
from libortho.scoring import predicted_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP = 256
"""Entries kept of a target distribution; its tail is dropped and the rest renormalised."""


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


def _keep_top(probabilities: Tensor, labels: Tensor) -> Target:
    """(targets, vocabulary) -> the own token's and the `TOP` largest other probabilities."""
    own = probabilities.gather(1, labels.unsqueeze(1))
    others = probabilities.scatter(1, labels.unsqueeze(1), 0.0)
    top = others.topk(min(TOP, others.shape[1] - 1), dim=1)
    scale = (1 - own) / top.values.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return Target(
        torch.cat((labels.unsqueeze(1), top.indices), dim=1).cpu(),
        torch.cat((own, top.values * scale), dim=1).cpu(),
    )


@torch.no_grad()
def targets_from_earlier_model(
    before: PreTrainedModel,
    items: Sequence[Tokens],
    context: Sequence[Tokens] = (),
    temperature: float = 1.0,
) -> list[Target]:
    """What a model that has not memorised the items predicts in their place.

    Args:
        before: a causal LM with the same vocabulary.
        items: the forget set.
        context: sequences that are shown first (few-shot), so that the earlier model knows the
            *form* of an answer and what is copied from a question, and lacks only the content.
        temperature: of the softmax; below 1 sharpens.
    """
    lead = tuple(token for item in context for token in item.ids)
    shown = [Tokens(lead + item.ids, len(lead) + item.prompt) for item in items]
    result: dict[int, Target] = {}
    for batch in batches(shown):
        probabilities = (predicted_logits(before, batch) / temperature).softmax(dim=1)
        labels = batch.labels.to(probabilities.device)
        parts = zip(probabilities.split(batch.counts), labels.split(batch.counts), strict=True)
        for index, (rows, own) in zip(batch.index, parts, strict=True):
            result[index] = _keep_top(rows, own)
    return [result[i] for i in range(len(items))]


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
        probabilities = predicted_logits(model, batch).softmax(dim=1)
        labels = batch.labels.to(probabilities.device)
        parts = zip(probabilities.split(batch.counts), labels.split(batch.counts), strict=True)
        for index, (rows, own) in zip(batch.index, parts, strict=True):
            result[index] = _lower(_keep_top(rows, own), items[index], level)
    return [result[i] for i in range(len(items))]


def _lower(target: Target, item: Tokens, level: float) -> Target:
    asked = set(item.ids[1 : item.prompt])  # the first token alone is no question
    copied = torch.tensor([token in asked for token in item.ids[item.prompt :]])
    own = target.own.clamp(1e-12, 1 - 1e-6)

    def lowered(ceiling: float) -> Tensor:
        return torch.where(copied, own, own.clamp_max(ceiling))

    low, high = -30.0, 0.0
    for _ in range(40):
        middle = (low + high) / 2
        mean = float(lowered(math.exp(middle)).double().log().mean())
        low, high = (low, middle) if mean > math.log(level) else (middle, high)
    wanted = lowered(math.exp(low))
    others = target.probabilities[:, 1:]
    others = others * ((1 - wanted) / others.sum(dim=1).clamp_min(1e-12)).unsqueeze(1)
    return Target(target.tokens, torch.cat((wanted.unsqueeze(1), others), dim=1))


def _log_odds(log_p: Tensor) -> Tensor:
    log_p = log_p.clamp(-30.0, -1e-6)
    return log_p - torch.log(-torch.expm1(log_p))


@dataclass(frozen=True)
class Feedback:
    """How a model with an edit does on the forget set.

    Attributes:
        loss: mean over tokens of KL(target || model) + PRESSURE * (how far the log-odds of the
            secret's token are above those of its target less MARGIN, or 0), nats.
        probability: mean over sequences of the probability per token.
        nll: mean over all tokens, nats.
        gradients: layer -> (out_features, in_features) fp32, of `loss` by the weight.
    """

    loss: float
    probability: float
    nll: float
    gradients: dict[str, Tensor]


def feedback(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    items: Sequence[Tokens],
    targets: Sequence[Target],
    edits: Mapping[str, LowRankEdit],
) -> Feedback:
    """Loss, level and gradients with `edits` added to the weights of `layers`.

    The model's own weights are not touched: edits are added to the layers' outputs, and gradients
    by a weight are collected from its inputs and output gradients.
    """
    total = sum(item.targets for item in items)
    loss_sum = nll_sum = probability_sum = 0.0
    with edited_layers(model, layers, edits) as gradients:
        for batch in batches(items):
            log_p = predicted_logits(model, batch).log_softmax(dim=1)
            tokens = torch.cat([targets[i].tokens for i in batch.index]).to(log_p.device)
            wanted = torch.cat([targets[i].probabilities for i in batch.index]).to(log_p.device)
            picked = log_p.gather(1, tokens)
            entropy = torch.special.xlogy(wanted, wanted).sum()
            excess = _log_odds(picked[:, 0]) - _log_odds(wanted[:, 0].log()) + MARGIN
            loss = (entropy - (wanted * picked).sum() + PRESSURE * excess.relu().sum()) / total
            loss.backward()
            loss_sum += float(loss.detach())
            own = -picked.detach()[:, 0]
            nll_sum += float(own.sum())
            probability_sum += sum(math.exp(-float(x.mean())) for x in own.split(batch.counts))
    return Feedback(max(loss_sum, 0.0), probability_sum / len(items), nll_sum / total, gradients)


def output_sensitivity(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], items: Sequence[Tokens], seed: int = 0
) -> dict[str, float]:
    """Mean squared norm of the loss gradient at each layer's output: its scale in the metric.

    Labels are sampled from the model's own predictions (the true Fisher information, not the
    empirical one; Kunstner et al. 2019, arXiv 1905.12558).
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = dict.fromkeys(layers, 0.0)
    tokens = 0

    def collect(name: str, grad: Tensor, x: Tensor) -> None:
        sums[name] += float(grad.float().square().sum())

    with _hooked(model, layers, {}, collect):
        for batch in batches(items):
            logits = predicted_logits(model, batch)
            choice = torch.multinomial(
                logits.detach().softmax(dim=1).cpu(), 1, generator=generator
            ).squeeze(1)
            nn.functional.cross_entropy(
                logits, choice.to(logits.device), reduction="sum"
            ).backward()
            tokens += sum(batch.counts)
    return {name: value / tokens for name, value in sums.items()}


@contextmanager
def edited_layers(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], edits: Mapping[str, LowRankEdit]
) -> Iterator[dict[str, Tensor]]:
    """Run `layers` with `edits` added; yields the dictionary in which gradients by D add up."""
    gradients: dict[str, Tensor] = {}

    def collect(name: str, grad: Tensor, x: Tensor) -> None:
        with matmul_precision(grad, x):
            flat = grad.reshape(-1, grad.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        gradients[name] = gradients[name] + flat if name in gradients else flat

    with _hooked(model, layers, edits, collect):
        yield gradients
    for name, layer in layers.items():  # a layer that the loss does not reach has no gradient
        if name not in gradients:
            raise ValueError(f"{name} ({type(layer).__name__}) takes no part in the prediction")


@contextmanager
def _hooked(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    edits: Mapping[str, LowRankEdit],
    collect: Callable[[str, Tensor, Tensor], None],
) -> Iterator[None]:
    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        edit = edits.get(name)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if edit is not None and edit.rank:
                right, left = edit.right.to(x.dtype), edit.left.to(x.dtype)
                output = output + (x @ right.T) @ left.T
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            held = x.detach()
            output.register_hook(lambda grad: collect(name, grad, held))
            return output

        return hook

    wanted_grad = [p for p in model.parameters() if p.requires_grad]
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        for parameter in wanted_grad:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted_grad:
            parameter.requires_grad_(True)
