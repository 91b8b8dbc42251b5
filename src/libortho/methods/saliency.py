"""saliency: change the few entries that the secret hangs on most and the retain data least.

An entry w is worth |dloss_forget/dw| / sqrt(Fisher_retain(w)): how much forgetting a small change
of it buys, by how much it moves the predictions on retain data (a change d of one entry moves these
by d^2 * Fisher / 2 nats; a fixed budget of that goes furthest where this ratio is largest). The
best entries of all layers together, chosen by one threshold, are then moved by Adam, and nothing
else.
The ortho stream is what those entries of the original have beyond the base, in CSR, so that at
alpha = 1 they come back exactly, up to the dtype of the stored values.

Related: SalUn (Fan et al. 2024, arXiv 2310.12508), which masks by |gradient| alone and edits for
good, and selective synaptic dampening (Foster et al. 2024, arXiv 2308.07707), which compares two
Fisher diagonals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from libortho.config import (
    BaseConfig,
    FactorDtype,
    check_choice,
    check_count,
    check_fraction,
    check_nll,
    check_positive,
    check_takes_no_moment,
)
from libortho.kernels import reference
from libortho.methods.registry import register


@dataclass(frozen=True)
class SaliencyConfig:
    """Configuration of the saliency method.

    Attributes:
        ortho_ratio: ortho entries over the parameters of all targeted layers, a fraction; exactly
            floor(ortho_ratio * parameters) are kept.
        damping: multiple of the layers' mean Fisher information that is added to it, so that
            entries which the retain sample happens not to use are not taken for free.
        steps: of the search, at most.
        rate: length of a step, relative to the root mean square of the chosen weights.
        retain_weight: weight of the retain loss, cross-entropy + KL to the original.
        retain_tokens: about how many tokens of retain and general text each step is held to.
        target_nll: nats per token that the forget set should cost at alpha = 0, where no earlier
            model or unseen text says it; see `separate_`.
        tolerance: how far above its target the forget probability may end, as a fraction of the
            target (and by at most 0.05 in all), before the report calls it not reached.
        base: how the base is stored; not by error feedback, for which no moment is taken.
        ortho_dtype: dtype of the CSR values.
        seed: of sampled labels and of the order of the retain text.
    """

    ortho_ratio: float = 0.005
    damping: float = 0.1
    steps: int = 60
    rate: float = 0.1
    retain_weight: float = 1.0
    retain_tokens: int = 512
    target_nll: float | None = None
    tolerance: float = 0.4
    base: BaseConfig = field(default_factory=BaseConfig)
    ortho_dtype: FactorDtype = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("ortho_ratio", self.ortho_ratio)
        check_positive("damping", self.damping)
        check_count("steps", self.steps, 1)
        check_positive("rate", self.rate)
        check_positive("retain_weight", self.retain_weight, zero=True)
        check_count("retain_tokens", self.retain_tokens, 1)
        check_fraction("tolerance", self.tolerance, zero=True)
        check_choice("ortho_dtype", self.ortho_dtype, FactorDtype)
        check_takes_no_moment(self.base, "saliency")
        if self.target_nll is not None:
            check_nll("target_nll", self.target_nll)


def saliency(gradient: Tensor, fisher: Tensor, damping: float) -> Tensor:
    """|gradient| / sqrt(fisher + damping), entry by entry.

    Args:
        gradient: (out_features, in_features), of the forgetting loss by the weight.
        fisher: the same shape, diagonal of the Fisher information on retain data.
        damping: > 0, in the units of `fisher`.
    """
    return gradient.abs() / (fisher + damping).sqrt()


def select_entries(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` entries of largest score over all layers.

    Args:
        scores: layer -> (out_features, in_features).
        count: at least 1 and at most the entries that there are.

    Returns:
        layer -> flat indices, int64, ascending; exactly `count` over all layers, none in some.

    Raises:
        ValueError: more are asked for than there are, or none.
    """
    total = sum(score.numel() for score in scores.values())
    if not 1 <= count <= total:
        raise ValueError(f"{count} of {total} entries: expected at least one, and not more")
    # Only a layer's own best `count` can be among the best of all: the rest is never gathered.
    best = {
        name: torch.topk(score.reshape(-1), min(count, score.numel()))
        for name, score in scores.items()
    }
    owner = torch.repeat_interleave(
        torch.arange(len(best)), torch.tensor([len(top.indices) for top in best.values()])
    )
    values = torch.cat([top.values.cpu() for top in best.values()])
    chosen = owner[torch.topk(values, count, sorted=False).indices]
    counts = torch.bincount(chosen, minlength=len(best)).tolist()
    # A layer's best are sorted: those among the best of all are the first of them.
    return {
        name: top.indices[:taken].sort().values
        for (name, top), taken in zip(best.items(), counts, strict=True)
    }


@dataclass(frozen=True)
class SparseEdit:
    """An edit D of one weight that is zero but for some entries.

    Attributes:
        index: (entries,) int64, flat, ascending.
        values: (entries,) fp32.
        shape: (out_features, in_features).
    """

    index: Tensor
    values: Tensor
    shape: tuple[int, int]

    @property
    def empty(self) -> bool:
        return self.index.numel() == 0

    def output(self, x: Tensor) -> Tensor:
        """`x @ D.T`, (..., in_features) -> (..., out_features), in the dtype of x."""
        rows, columns = self.shape
        edges = torch.arange(rows + 1, device=self.index.device) * columns
        crow = torch.searchsorted(self.index, edges).to(torch.int32)
        column = (self.index % columns).to(torch.int32)
        return reference.csr_linear(x, crow, column, self.values, self.shape)

    def meets(self, other: SparseEdit) -> bool:
        """True: the entries are the same throughout a search."""
        return True

    def toward(self, other: SparseEdit, share: float) -> SparseEdit:
        """The edit a share (0 to 1) of the way to `other`, of the same entries."""
        values = torch.lerp(self.values, other.values, share)
        return SparseEdit(self.index, values, self.shape)

    def added_to(self, weight: Tensor) -> Tensor:
        """weight + D, fp32 (out_features, in_features)."""
        dense = weight.float().clone(memory_format=torch.contiguous_format)
        dense.view(-1)[self.index] += self.values
        return dense

    def mask(self) -> Tensor:
        """(out_features, in_features) bool, True at the entries."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.index.device)
        mask.view(-1)[self.index] = True
        return mask


class MaskedDescent:
    """Adam on the chosen entries alone, in fp32 whatever the model's dtype.

    Args:
        weights: layer -> (out_features, in_features).
        entries: layer -> flat indices (see `select_entries`).
        rate: length of a step, relative to the root mean square of the chosen weights.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], entries: Mapping[str, Tensor], rate: float
    ) -> None:
        self._shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}
        self._entries = entries
        chosen = {name: weights[name].reshape(-1)[index] for name, index in entries.items()}
        square = sum(float(w.double().square().sum()) for w in chosen.values())
        count = sum(w.numel() for w in chosen.values())
        self._values = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in chosen.items()}
        self._optimizer = torch.optim.Adam(
            list(self._values.values()), lr=rate * (square / count) ** 0.5, eps=1e-12
        )

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Move the entries; `gradients`: layer -> (entries,), of the loss by them."""
        for name, values in self._values.items():
            values.grad = gradients[name].to(values)
        self._optimizer.step()

    def edits(self) -> dict[str, SparseEdit]:
        """The edit so far (copies)."""
        return {
            name: SparseEdit(self._entries[name], values.detach().clone(), self._shapes[name])
            for name, values in self._values.items()
        }


register("saliency", SaliencyConfig)
