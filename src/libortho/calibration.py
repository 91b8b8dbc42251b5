"""What a model does with a text: second moments of its layers' inputs, and their gradients.

Tokens are streamed through the model once; what is kept per layer is a (d, d) sum, whatever the
number of tokens, and the last few thousand of their inputs, which are added in one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from libortho.data.tokens import Batch, Tokens, batches, collate
from libortho.devices import device_of
from libortho.gram import Gram
from libortho.scoring import check_vocabulary, predicted_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tick = Callable[[int], None]
"""Called with the number of sequences just done."""


@dataclass
class Moments:
    """Sums of x x^T over the positions of a text, for one layer.

    Position 0 is kept apart: in many language models it is an attention sink, whose activations are
    orders of magnitude larger than all others and would drown them in one average.

    Attributes:
        body: over positions >= 1, with their weights.
        tokens: how many positions are in `body` (a sum of weights).
        first: over position 0.
        sequences: how many are in `first`.
    """

    body: Gram
    tokens: float
    first: Gram
    sequences: float

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Moments:
        return cls(Gram(width, device), 0.0, Gram(width, device), 0.0)

    def add(self, x: Tensor, body: Tensor, first: Tensor) -> None:
        """Count a batch's inputs.

        Args:
            x: (rows, length, d), or the same with rows and length in one dimension.
            body: (rows, length), weight of each position (see `position_weights`).
            first: (rows,), 1 where position 0 counts.
        """
        body, first = body.to(x.device), first.to(x.device)
        x = x.reshape(*body.shape, x.shape[-1])
        # Multiplying by a weight of zero would let a NaN at a padded position through; selecting
        # won't.
        counted = body > 0
        rows, weights = x[counted], body[counted]
        if not bool((weights == 1).all()):
            rows = rows.float() * weights.sqrt().unsqueeze(-1)
        self.body.add(rows)
        self.tokens += float(body.sum())
        self.first.add(x[:, 0][first > 0])
        self.sequences += int((first > 0).sum())

    def add_(self, other: Moments) -> None:
        """Add the sums of `other`, which must not be used any more."""
        self.body.add_(other.body)
        self.first.add_(other.first)
        self.tokens += other.tokens
        self.sequences += other.sequences

    def compact_(self) -> None:
        """Hold no more than two squares of in_features."""
        self.body.compact_()
        self.first.compact_()

    def weigh_(self, tokens: float, sequences: float) -> None:
        """Count what is there as so many times as many tokens and sequences; means stay.

        What is added from then on has its weight beside that: sums over sets of different sizes
        can so be gathered into one average over the sets.
        """
        self.body.scale_(tokens)
        self.tokens *= tokens
        self.first.scale_(sequences)
        self.sequences *= sequences

    def mean(self) -> Gram:
        """E[x x^T] over positions >= 1, plus E[x_0 x_0^T] over first positions.

        It takes the sums' own memory: they must not be used any more.
        """
        self.body.scale_(1 / max(self.tokens, 1.0))
        self.first.scale_(1 / max(self.sequences, 1.0))
        self.body.add_(self.first)
        return self.body


def second_moments(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    items: Sequence[Tokens],
    *,
    weights: Sequence[Tensor] | None = None,
    tick: Tick | None = None,
    into: dict[str, Moments] | None = None,
) -> dict[str, Moments]:
    """Accumulate the inputs of `layers` while `items` run through the model.

    Args:
        model: a causal LM; only its decoder runs, without gradients.
        layers: module name -> linear layer.
        items: sequences.
        weights: per item, one weight >= 0 for each predicted token: only positions that predict are
            then counted, each with its weight, and position 0 not at all. None counts every
            position with weight 1.
        tick: called after each batch.
        into: moments that this text's are to be added to, in their place.

    Returns:
        Moments per module name, on the layers' devices.

    Raises:
        ValueError: an activation is NaN or Inf (the layer is named), or a token id is beyond the
            vocabulary.
    """
    moments = {} if into is None else into
    inputs: dict[str, list[Tensor]] = {}
    with _record_inputs(layers, inputs), torch.no_grad():
        for batch in batches(items):
            _run(model, batch)
            body, first = position_weights(batch, weights)
            for name, calls in inputs.items():
                for x in calls:
                    if name not in moments:
                        moments[name] = Moments.zeros(x.shape[-1], x.device)
                    moments[name].add(x, body, first)
            inputs.clear()
            if tick:
                tick(len(batch.index))
    missing = [name for name in layers if name not in moments]
    if missing:
        raise ValueError(f"these layers saw no input from the calibration text: {missing}")
    for name, m in moments.items():
        if not all(bool(torch.isfinite(g.diagonal()).all()) for g in (m.body, m.first)):
            raise ValueError(f"{name}: the calibration text gives NaN or Inf activations")
    return moments


def mean_squares(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    rows: Mapping[str, Tensor],
    items: Sequence[Tokens],
) -> dict[str, Tensor]:
    """E[(R x)^2] over the positions that predict, for the inputs x of each layer.

    The diagonal of R E[x x^T] R^T, without the (d, d) moment.

    Args:
        model: a causal LM; only its decoder runs, without gradients.
        layers: module name -> linear layer.
        rows: module name -> R, (directions, in_features) fp32, for some of the layers.
        items: sequences.

    Returns:
        Module name -> (directions,) fp32.
    """
    sums = {
        name: torch.zeros(len(r), dtype=torch.float32, device=r.device) for name, r in rows.items()
    }
    tokens = dict.fromkeys(rows, 0)
    inputs: dict[str, list[Tensor]] = {}
    weights = [torch.ones(item.targets, dtype=torch.float32) for item in items]
    with _record_inputs({name: layers[name] for name in rows}, inputs), torch.no_grad():
        for batch in batches(items):
            _run(model, batch)
            counted = position_weights(batch, weights)[0] > 0
            for name, calls in inputs.items():
                for x in calls:
                    at = x.reshape(*counted.shape, x.shape[-1])[counted.to(x.device)]
                    sums[name] += (at.float() @ rows[name].T).square().sum(dim=0)
                    tokens[name] += len(at)
            inputs.clear()
    return {name: total / max(tokens[name], 1) for name, total in sums.items()}


@torch.no_grad()
def not_finite(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], items: Sequence[Tokens]
) -> tuple[int, str] | None:
    """The first sequence that a model makes NaN or Inf of, and where; None where there is none.

    Runs every sequence alone: for the time after something has failed.

    Args:
        model: a causal LM.
        layers: module name -> linear layer, whose inputs are looked at.
        items: sequences.

    Returns:
        (index in `items`, the first layer with such an input, in the order in which they run, or
        "the logits").
    """
    inputs: dict[str, list[Tensor]] = {}
    with _record_inputs(layers, inputs):
        for index, item in enumerate(items):
            logits = predicted_logits(model, collate([item], [0]))
            for name, calls in inputs.items():
                if not all(bool(torch.isfinite(x).all()) for x in calls):
                    return index, name
            if bool(logits.isnan().any()):  # -Inf is how a model bars a token
                return index, "the logits"
            inputs.clear()
    return None


def position_weights(
    batch: Batch, weights: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(rows, length) weights of the positions >= 1 and (rows,) of position 0; see `second_moments`.

    `weights` has one tensor an item of the whole set, of which the batch knows its own.
    """
    if weights is None:
        body = batch.attention.float()
        first = torch.ones(len(batch.index), dtype=torch.float32)
    else:
        body = torch.zeros(batch.ids.shape, dtype=torch.float32)
        body[batch.predicts] = torch.cat([weights[i].float() for i in batch.index])
        first = torch.zeros(len(batch.index), dtype=torch.float32)
    body[:, 0] = 0.0
    return body, first


@contextmanager
def _record_inputs(
    layers: Mapping[str, nn.Module], inputs: dict[str, list[Tensor]]
) -> Iterator[None]:
    # A list, since a layer that stands in several places runs several times a pass.
    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        device = device_of(layers[name])

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # accelerate may bring the input to the layer's device after this hook.
            inputs.setdefault(name, []).append(args[0].detach().to(device))

        return hook

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: PreTrainedModel, batch: Batch) -> None:
    check_vocabulary(model, batch)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    device = device_of(model.get_input_embeddings())
    decoder(
        input_ids=batch.ids.to(device), attention_mask=batch.attention.to(device), use_cache=False
    )
