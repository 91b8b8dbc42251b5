"""Perturbation: shake the weights and see whether the memory falls out.

Unlearning by small steps can be undone by quantisation, which rounds the steps away (Zhang et al.
2024, arXiv 2410.16454). Here the base is stored anew in coarser or merely other groups, pruned, and
stirred with noise. Who also holds the public pretrained model can undo an edit: put the public
weights back, or take the largest directions out of the difference from them, among which an edit of
few directions stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

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
from libortho.attacks.difference import Directions
from libortho.base import check_width, quantize
from libortho.config import BaseConfig, check_count, check_fraction, check_positive
from libortho.data.sampling import evenly
from libortho.data.tokens import Tokens
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
        undone: numbers of largest singular directions of each layer's difference from the public
            model that are taken out of it.
        retain_questions: at most so many show what is left of the model.
        seed: of the noise.
    """

    int4_groups: tuple[int, ...] = (32, 64, 128)
    int8_groups: tuple[int | None, ...] = (None, 64)
    prune: tuple[float, ...] = (0.1,)
    noise: tuple[float, ...] = (0.02, 0.05)
    undone: tuple[int, ...] = (1, 4, 16)
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
        for count in self.undone:
            check_count("undone", count, 1)

    @classmethod
    def small(cls, seed: int) -> PerturbationConfig:
        """The same changes, seen by fewer retain questions."""
        return cls(retain_questions=20, seed=seed)


@dataclass(frozen=True)
class Change:
    """One thing that is done to each weight.

    Attributes:
        name: of its score.
        apply: (weight, the public model's), both (out_features, in_features) fp32 -> what it
            becomes.
        stored: how it is stored, if it is a way of storing.
        public: whether it needs the public model.
    """

    name: str
    apply: Callable[[Tensor, Tensor], Tensor]
    stored: BaseConfig | None = None
    public: bool = False


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
    public = {} if data.pretrained is None else dict(data.pretrained.named_modules())
    forget = data.encode(data.forget)
    retain = data.encode(evenly(data.retain, config.retain_questions))

    def known(items: list[Tokens]) -> list[float]:
        nll = sequence_nll(model, items)
        return [probability(loss_score(x.tolist())) for x in nll]

    before = known(forget)
    scores = [_score("unchanged", before, before, known(retain))]
    missing: dict[str, str] = {}
    planned = list(_changes(config))
    for step, change in enumerate(planned):
        progress("changed weights", step, len(planned))
        reason = _refused(change, weights, data)
        if reason is not None:
            missing[change.name] = reason
            continue
        for layer, weight in weights.items():
            other = weight_of(public[layer], layer).to(weight) if change.public else weight
            _write(modules[layer], change.apply(weight, other))
        scores.append(_score(change.name, known(forget), before, known(retain)))
    progress("changed weights", len(planned), len(planned))
    return Findings(tuple(scores), missing)


def _score(name: str, now: list[float], before: list[float], retain: list[float]) -> Score:
    shift = sum(now) / len(now) - sum(before) / len(before)
    details = {"shift": shift, "retain_probability": sum(retain) / len(retain)}
    return mean_score(name, PROBABILITY, now, details=details)


def _changes(config: PerturbationConfig) -> Iterator[Change]:
    for storage, groups in (("int4", config.int4_groups), ("int8", config.int8_groups)):
        for group in groups:
            stored = BaseConfig(storage, group_size=group, rounding="nearest")  # type: ignore[arg-type]
            of = "a row" if stored.group_size is None else f"{stored.group_size} columns"
            name = f"{storage.upper()}, a scale for {of}"
            yield Change(name, partial(_requantised, config=stored), stored)
    for share in config.prune:
        yield Change(f"smallest {share:.0%} pruned", partial(_pruned, share=share))
    generator = torch.Generator().manual_seed(config.seed)
    for size in config.noise:
        yield Change(f"noise of {size:.0%}", partial(_noisy, size=size, generator=generator))
    if config.undone:
        yield Change("public weights put back", lambda weight, public: public, public=True)
    for count in config.undone:
        name = f"largest {count} of the difference taken out"
        yield Change(name, partial(_undone, count=count), public=True)


def _refused(change: Change, weights: dict[str, Tensor], data: AttackData) -> str | None:
    if change.public and data.pretrained is None:
        return "no pretrained model was given to compare with (--pretrained)"
    if change.stored is None:
        return None
    try:
        for name, weight in weights.items():
            check_width(weight.shape[1], change.stored, name)
    except ValueError as error:
        return str(error)
    return None


def _requantised(weight: Tensor, public: Tensor, config: BaseConfig) -> Tensor:
    return quantize(weight, config).dequantize(torch.float32)


def _pruned(weight: Tensor, public: Tensor, share: float) -> Tensor:
    count = int(share * weight.numel())
    if count == 0:
        return weight
    limit = weight.abs().flatten().kthvalue(count).values
    return torch.where(weight.abs() <= limit, 0.0, weight)


def _noisy(weight: Tensor, public: Tensor, size: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return weight + size * weight.std() * noise


def _undone(weight: Tensor, public: Tensor, count: int) -> Tensor:
    largest = Directions.of(weight - public, count)
    if largest is None:
        return weight
    return weight - (largest.left * largest.sizes) @ largest.right


def _write(layer: torch.nn.Module, weight: Tensor) -> None:
    target = layer.weight
    assert isinstance(target, Tensor)
    with torch.no_grad():
        target.copy_(weight.T if is_conv1d(layer) else weight)
