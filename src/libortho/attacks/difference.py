"""Difference: what the weights themselves say about what was taken out of them.

An attacker who holds a base and the public pretrained model can subtract one from the other; one
who holds the ortho file alone has the taken-out directions as they are. Two questions to either:

- lens: what a layer writes goes into the residual stream, where the output layer reads words. Which
  candidates' words lie along the left singular vectors?
- response: run a candidate through the public model and multiply what each layer reads by the
  difference. Which candidates does it react to?

Candidates are the authors' names, and whole questions. Telling means that the forgotten ones can be
told from others: an AUC away from 0.5, to either side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from libortho.attacks.common import (
    AttackData,
    Findings,
    Progress,
    Score,
    Subject,
    question_of,
    weight_of,
    with_question,
)
from libortho.attacks.names import names_in
from libortho.config import check_count
from libortho.data.tokens import Tokens, batches
from libortho.evaluation.metrics import membership_auc
from libortho.layer import OrthoLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUC = "AUC, to either side"
ORTHO = "ortho file"
"""Begins the names of scores that need no base: no other model has such a file."""


@dataclass(frozen=True)
class DifferenceConfig:
    """How the difference is read.

    Attributes:
        directions: largest singular directions of each layer's difference that are looked at.
    """

    directions: int = 8

    def __post_init__(self) -> None:
        check_count("directions", self.directions, 1)

    @classmethod
    def small(cls, seed: int) -> DifferenceConfig:
        """The same: it is one forward pass and one decomposition a layer."""
        return cls()


@dataclass(frozen=True)
class Directions:
    """left @ diag(sizes) @ right, a layer's difference as far as it is looked at; fp32.

    Attributes:
        left: (out_features, k), orthonormal columns. right: (k, in_features), orthonormal rows.
        sizes: (k,), falling, > 0.
    """

    left: Tensor
    sizes: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor, count: int) -> Directions | None:
        """The `count` largest of a (out_features, in_features) matrix; None if it is zero."""
        left, sizes, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        # A product of stored factors has no rank beyond theirs, but rounding has.
        kept = min(count, int((sizes > 1e-5 * sizes[:1]).sum()) if float(sizes[:1]) > 0 else 0)
        return cls(left[:, :kept], sizes[:kept], right[:kept]) if kept else None


def difference(
    subject: Subject, data: AttackData, config: DifferenceConfig, progress: Progress
) -> Findings:
    """How well the forgotten candidates can be told by either reading, of either difference.

    Names are told from all other names; questions from held-out ones. `details` has the rank of
    each forgotten name among all, 1 being what the reading puts forward first.
    """
    if data.pretrained is None:
        return Findings(
            (), {"difference": "no pretrained model was given to compare with (--pretrained)"}
        )
    public = dict(data.pretrained.named_modules())
    own = dict(subject.model.named_modules())
    found: dict[str, dict[str, Directions]] = {"": {}, f"{ORTHO}: ": {}}
    for step, name in enumerate(subject.layers):
        progress("decompose", step, len(subject.layers))
        layer = own[name]
        weight = weight_of(layer, name)
        matrices = {"": weight - weight_of(public[name], name).to(weight.device)}
        if isinstance(layer, OrthoLinear) and layer.ortho is not None:
            matrices[f"{ORTHO}: "] = layer.ortho.dense()
        for source, matrix in matrices.items():
            directions = Directions.of(matrix, config.directions)
            if directions is not None:
                found[source][name] = directions
    progress("decompose", len(subject.layers), len(subject.layers))
    scores: list[Score] = []
    missing: dict[str, str] = {}
    for source, layers in found.items():
        if layers:
            for name, told in _readings(layers, data):
                if isinstance(told, str):
                    missing[source + name] = told
                else:
                    scores.append(Score(source + name, AUC, told[0], 0.5, details=told[1]))
        elif not source:
            missing["difference"] = "the targeted layers are the public model's own"
    return Findings(tuple(scores), missing)


def _readings(
    layers: Mapping[str, Directions], data: AttackData
) -> list[tuple[str, str | tuple[float, dict[str, object]]]]:
    """(name, (AUC, details) or why it could not be read)."""
    forgotten = names_in(data.forget)
    others = [n for n in (*names_in(data.retain), *names_in(data.holdout)) if n not in forgotten]
    names = [*forgotten, *others]
    if not forgotten or not others:
        told: str | None = "no name was found in the questions to be told from another"
    else:
        told = None
    results: list[tuple[str, str | tuple[float, dict[str, object]]]] = []
    for reading, rated in (
        ("names by the lens", None if told else by_lens(layers, names, data)),
        ("names by response", None if told else by_response(layers, _plain(names, data), data)),
    ):
        if told is not None:
            results.append((reading, told))
        elif rated is None:
            results.append((reading, "no targeted layer writes to the residual stream"))
        else:
            ranks = {
                name: 1 + sum(other > rated[i] for other in rated)
                for i, name in enumerate(forgotten)
            }
            auc, details = two_sided(rated[: len(forgotten)], rated[len(forgotten) :])
            results.append((reading, (auc, {**details, "ranks": ranks, "names": len(names)})))
    told_of, unseen = with_question(data.forget), with_question(data.holdout)
    if told_of and unseen:
        asked = [question_of(e) for e in (*told_of, *unseen)]
        rated = by_response(layers, _plain(asked, data), data)
        count = len(told_of)
        results.append(("questions by response", two_sided(rated[:count], rated[count:])))
    elif data.holdout:
        results.append(("questions by response", "one of the two sets has no question"))
    else:
        results.append(("questions by response", "no held-out questions were given (--holdout)"))
    return results


def two_sided(told: Sequence[float], others: Sequence[float]) -> tuple[float, dict[str, object]]:
    """max(AUC, 1 - AUC) of telling the two apart, and what it is worth.

    Chance is somewhat above 0.5 for small sets, the larger side being taken: "null_sd" is the
    standard deviation of the AUC of a reading that knows nothing.
    """
    auc = membership_auc(others, told)  # 1 where what was forgotten is rated above
    m, n = len(told), len(others)
    details: dict[str, object] = {
        "auc": auc,
        "null_sd": math.sqrt((m + n + 1) / (12 * m * n)),
        "forgotten": m,
        "others": n,
    }
    return max(auc, 1 - auc), details


def _plain(texts: Sequence[str], data: AttackData) -> list[Tokens]:
    """Texts after a line break, so that their first words do not stand at position 0."""
    return [Tokens(tuple(data.tokenizer(f"\n{text}").input_ids)) for text in texts]


@torch.no_grad()
def by_lens(
    layers: Mapping[str, Directions], texts: Sequence[str], data: AttackData
) -> list[float] | None:
    """How much of each text's words lies along what the difference writes; None if nowhere.

    For a word's output vector e and a layer's left directions u_k of sizes s_k:
    sum_k s_k^2 cos(e, u_k)^2, summed over layers and averaged over the text's tokens.
    """
    assert data.pretrained is not None
    weight = data.pretrained.get_output_embeddings().weight.float().cpu()
    centre = weight.mean(dim=0)
    writing = [d for d in layers.values() if d.left.shape[0] == weight.shape[1]]
    if not writing:
        return None
    rated = []
    for text in texts:
        ids = data.tokenizer(f" {text}", add_special_tokens=False).input_ids
        words = torch.nn.functional.normalize(weight[torch.tensor(ids)] - centre, dim=1)
        energy = sum(
            float(((words @ d.left.cpu()) * d.sizes.cpu()).square().sum()) for d in writing
        )
        rated.append(energy / len(ids))
    return rated


@torch.no_grad()
def by_response(
    layers: Mapping[str, Directions], items: Sequence[Tokens], data: AttackData
) -> list[float]:
    """How strongly the difference reacts to what the public model's layers read of each text.

    Per layer, the mean of ||D x||^2 / ||x||^2 over all positions but the first (an attention sink
    of its own scale), over ||D||_F^2; then the mean over layers.
    """
    assert data.pretrained is not None
    totals = torch.zeros(len(items), dtype=torch.float64)
    model: PreTrainedModel = data.pretrained
    modules = dict(model.named_modules())
    for batch in batches(items):
        mask = batch.attention.bool()
        mask[:, 0] = False
        seen: dict[str, Tensor] = {}

        def keep(name: str, mask: Tensor = mask, seen: dict[str, Tensor] = seen) -> object:
            def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
                d, x = layers[name], args[0].float()
                answer = (x @ d.right.T.to(x.device)) * d.sizes.to(x.device)
                share = answer.square().sum(-1) / x.square().sum(-1).clamp_min(1e-12)
                kept = mask.to(x.device)
                mean = (share * kept).sum(1) / kept.sum(1)
                seen[name] = (mean / d.sizes.square().sum().to(x.device)).double().cpu()

            return hook

        handles = [modules[n].register_forward_pre_hook(keep(n)) for n in layers]
        try:
            device = next(model.parameters()).device
            model.base_model(
                input_ids=batch.ids.to(device),
                attention_mask=batch.attention.to(device),
                use_cache=False,
            )
        finally:
            for handle in handles:
                handle.remove()
        totals[batch.index] = torch.stack(list(seen.values())).mean(dim=0)
    return [float(value) for value in totals]
