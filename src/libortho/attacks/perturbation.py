"""Perturbation: shake the weights and see whether the memory falls out.

Unlearning by small steps can be undone by quantisation, which rounds the steps away (Zhang et al.
2024, arXiv 2410.16454). Here the base is stored anew in coarser or merely other groups, pruned, and
stirred with noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.attacks.common import (
    AttackData,
    Findings,
    Progress,
    Score,
    Subject,
    mean_score,
    weight_of,
)
from libortho.base import check_width, quantize
from libortho.config import BaseConfig, check_fraction, check_positive
from libortho.data.tokens import Tokens, evenly
from libortho.evaluation.metrics import loss_score, probability
from libortho.linear import is_conv1d
from libortho.scoring import sequence_nll

PROBABILITY = "answer probability"


@dataclass(frozen=True)
class PerturbationConfig:
    """What is done to the weights of the layers that were split, each by itself.

    Attributes:
        int4_groups: columns that share a scale, nearest rounding.
        int8_groups: the same; None is a whole row.
        prune: shares of each layer's weights, the smallest, that become 0.
        noise: standard deviations of Gaussian noise over that of the layer's weights.
        retain_questions: at most so many show what is left of the model.
        seed: of the noise.
    """

    int4_groups: tuple[int, ...] = (32, 64, 128)
    int8_groups: tuple[int | None, ...] = (None, 64)
    prune: tuple[float, ...] = (0.1,)
    noise: tuple[float, ...] = (0.02, 0.05)
    retain_questions: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for columns in self.int4_groups:
            BaseConfig("int4", group_size=columns)
        for group in self.int8_groups:
            BaseConfig("int8", group_size=group)
        for share in self.prune:
            check_fraction("prune", share)
        for size in self.noise:
            check_positive("noise", size)

    @classmethod
    def small(cls, seed: int) -> PerturbationConfig:
        """The same changes, seen by fewer retain questions."""
        return cls(retain_questions=20, seed=seed)


Change = Callable[[Tensor], Tensor]
"""A weight (out_features, in_features) in fp32 -> what it becomes."""


def perturbation(
    subject: Subject, data: AttackData, config: PerturbationConfig, progress: Progress
) -> Findings:
    """Answer probability of the forget set after each change.

    `details` has its move from the unchanged model ("shift"), and the retain set's probability,
    without which a low number could be mere damage.
    """
    model = subject.dense()
    modules = dict(model.named_modules())
    # From the layers as they are stored, not from the copy's own (bf16) rounding of them.
    stored = dict(subject.model.named_modules())
    weights = {name: weight_of(stored[name], name) for name in subject.layers}
    forget = data.encode(data.forget)
    retain = data.encode(evenly(data.retain, config.retain_questions))

    def known(items: list[Tokens]) -> list[float]:
        nll = sequence_nll(model, items)
        return [probability(loss_score(x.tolist())) for x in nll]

    before = known(forget)
    scores = [_score("unchanged", before, before, known(retain))]
    missing: dict[str, str] = {}
    planned = list(_changes(config))
    for step, (name, stored_as, change) in enumerate(planned):
        progress("changed weights", step, len(planned))
        reason = _refused(weights, stored_as)
        if reason is not None:
            missing[name] = reason
            continue
        for layer, weight in weights.items():
            _write(modules[layer], change(weight))
        scores.append(_score(name, known(forget), before, known(retain)))
    progress("changed weights", len(planned), len(planned))
    return Findings(tuple(scores), missing)


def _score(name: str, now: list[float], before: list[float], retain: list[float]) -> Score:
    shift = sum(now) / len(now) - sum(before) / len(before)
    details = {"shift": shift, "retain_probability": sum(retain) / len(retain)}
    return mean_score(name, PROBABILITY, now, details=details)


def _changes(config: PerturbationConfig) -> Iterator[tuple[str, BaseConfig | None, Change]]:
    """(name, how it is stored if it is a way of storing, the change)."""
    for storage, groups in (("int4", config.int4_groups), ("int8", config.int8_groups)):
        for group in groups:
            stored = BaseConfig(storage, group_size=group, rounding="nearest")  # type: ignore[arg-type]
            of = "a row" if stored.group_size is None else f"{stored.group_size} columns"
            yield f"{storage.upper()}, a scale for {of}", stored, _requantised(stored)
    for share in config.prune:
        yield f"smallest {share:.0%} pruned", None, _pruned(share)
    generator = torch.Generator().manual_seed(config.seed)
    for size in config.noise:
        yield f"noise of {size:.0%}", None, _noisy(size, generator)


def _refused(weights: dict[str, Tensor], stored: BaseConfig | None) -> str | None:
    if stored is None:
        return None
    try:
        for name, weight in weights.items():
            check_width(weight.shape[1], stored, name)
    except ValueError as error:
        return str(error)
    return None


def _requantised(config: BaseConfig) -> Change:
    return lambda weight: quantize(weight, config).dequantize(torch.float32)


def _pruned(share: float) -> Change:
    def prune(weight: Tensor) -> Tensor:
        count = int(share * weight.numel())
        if count == 0:
            return weight
        limit = weight.abs().flatten().kthvalue(count).values
        return torch.where(weight.abs() <= limit, 0.0, weight)

    return prune


def _noisy(size: float, generator: torch.Generator) -> Change:
    def stir(weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        return weight + size * weight.std() * noise

    return stir


def _write(layer: torch.nn.Module, weight: Tensor) -> None:
    target = layer.weight
    assert isinstance(target, Tensor)
    with torch.no_grad():
        target.copy_(weight.T if is_conv1d(layer) else weight)
