"""The backward side of a text: what the loss says about layers, without touching a parameter.

Edits are added to the layers' outputs, and a gradient by a weight is collected from the layer's
inputs and output gradients, so the model's own weights need no gradients and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn

from libortho.calibration import Moments, Tick, position_weights
from libortho.data.tokens import Batch, Tokens, batches
from libortho.devices import device_of
from libortho.linalg import matmul_precision
from libortho.scoring import predicted_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FISHER_BATCH_TOKENS = 128
"""Tokens whose gradients are added up before they are squared. The expectation is the same for any
number; fewer give more samples, and so less noise, at the price of speed."""


class Edit(Protocol):
    """A change D of one weight, (out_features, in_features), in some form."""

    @property
    def empty(self) -> bool:
        """True where D is zero for want of parameters."""

    def output(self, x: Tensor) -> Tensor:
        """`x @ D.T`; x (..., in_features), gradients flow to x."""

    def meets(self, other: Self) -> bool:
        """True where `toward` leads to `other`: both have the same parameters."""

    def toward(self, other: Self, share: float) -> Self:
        """The edit a share (0 to 1) of the way to `other`."""


class Factored(Edit, Protocol):
    """An edit D = left @ right."""

    @property
    def left(self) -> Tensor:
        """(out_features, rank)."""

    @property
    def right(self) -> Tensor:
        """(rank, in_features)."""


FactorGradient = tuple[Tensor, Tensor]
"""Gradients by `left`, (out_features, rank), and by `right`, (rank, in_features), fp32."""


@contextmanager
def with_edits(layers: Mapping[str, nn.Module], edits: Mapping[str, Edit]) -> Iterator[None]:
    """Run `layers` with `edits` added, forward only."""

    def hook_of(
        edit: Edit, device: torch.device
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        # accelerate moves inputs and outputs to and from the layer's device out of a hook's sight.
        return lambda _, args, output: output + edit.output(args[0].to(device)).to(output.device)

    handles = [
        layers[name].register_forward_hook(hook_of(edit, device_of(layers[name])))
        for name, edit in edits.items()
        if not edit.empty
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edited_factors(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], edits: Mapping[str, Factored]
) -> Iterator[dict[str, FactorGradient]]:
    """As `edited_layers`, but what adds up are gradients by the edits' factors.

    Far cheaper than those by D where the rank is small: no (out, in) matrix is formed. Layers whose
    edit is empty have none.
    """
    gradients: dict[str, FactorGradient] = {}

    def collect(name: str, grad: Tensor, x: Tensor) -> None:
        edit = edits[name]
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if rows.dtype == torch.float16:  # in which a sum over tokens may overflow
            rows, inputs = rows.float(), inputs.float()
        left = rows.T @ (inputs @ edit.right.to(inputs.dtype).T)
        right = (rows @ edit.left.to(rows.dtype)).T @ inputs
        held = gradients.get(name)
        gradients[name] = (
            (left.float(), right.float())
            if held is None
            else (held[0] + left.float(), held[1] + right.float())
        )

    moved = {name: layer for name, layer in layers.items() if not edits[name].empty}
    with _hooked(model, moved, edits, collect):
        yield gradients
    _check_reached(moved, gradients)


@contextmanager
def edited_layers(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    edits: Mapping[str, Edit],
    entries: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Run `layers` with `edits` added; yields the dictionary in which gradients by D add up.

    Args:
        model: a causal LM; its parameters collect no gradients meanwhile.
        layers: module name -> linear layer.
        edits: module name -> edit; a layer may have none.
        entries: module name -> flat indices, int64, of the entries of D whose gradients are wanted;
            None wants all. What is collected is then (entries,) instead of (out, in).

    Raises:
        ValueError: at the end, a layer that no loss has reached.
    """
    gradients: dict[str, Tensor] = {}

    def collect(name: str, grad: Tensor, x: Tensor) -> None:
        with matmul_precision(grad, x):
            flat = grad.reshape(-1, grad.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        if entries is not None:
            flat = flat.reshape(-1)[entries[name]]
        gradients[name] = gradients[name] + flat if name in gradients else flat

    with _hooked(model, layers, edits, collect):
        yield gradients
    _check_reached(layers, gradients)


def output_sensitivity(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], items: Sequence[Tokens], seed: int = 0
) -> dict[str, float]:
    """Mean squared norm of the loss gradient at each layer's output: its scale in the metric.

    Labels are sampled from the model's own predictions (see `_sampled_loss`).
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = dict.fromkeys(layers, 0.0)
    tokens = 0

    def collect(name: str, grad: Tensor, x: Tensor) -> None:
        sums[name] += float(grad.float().square().sum())

    with _hooked(model, layers, {}, collect):
        for batch in batches(items):
            _sampled_loss(model, batch, generator).backward()
            tokens += sum(batch.counts)
    return {name: value / tokens for name, value in sums.items()}


def fisher_diagonal(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    items: Sequence[Tokens],
    seed: int = 0,
    tick: Tick | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of each layer's weight, per predicted token.

    Squares of the gradients of *batches* of about `FISHER_BATCH_TOKENS` tokens, with labels sampled
    from the model's own predictions. Gradients by sampled labels are independent with mean zero, so
    the expected square of their sum is the sum of their expected squares: the estimate is unbiased
    whatever the batch (Kunstner et al. 2019, arXiv 1905.12558, on why labels are to be sampled).

    Returns:
        Layer -> (out_features, in_features) fp32, >= 0.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    tokens = 0
    with edited_layers(model, layers, {}) as gradients:
        for batch in batches(items, FISHER_BATCH_TOKENS):
            gradients.clear()
            _sampled_loss(model, batch, generator).backward()
            for name, gradient in gradients.items():
                if name in sums:
                    sums[name].addcmul_(gradient, gradient)
                else:
                    sums[name] = gradient.square()
            tokens += sum(batch.counts)
            if tick:
                tick(len(batch.index))
        gradients.update(sums)  # an expert counts as reached that some batch has reached
    return {name: total.div_(tokens) for name, total in sums.items()}


@dataclass
class KroneckerFactors:
    """The two factors of a layer's K-FAC, Fisher = G (x) A (Martens and Grosse 2015, 1503.05671).

    Attributes:
        inputs: sums of x x^T, from which A = E[x x^T].
        outputs: (out_features, out_features) fp32, sum of g g^T over all positions, g being the
            gradient of the loss, with sampled labels, by the layer's output.
    """

    inputs: Moments
    outputs: Tensor


def kronecker_factors(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    items: Sequence[Tokens],
    seed: int = 0,
    tick: Tick | None = None,
) -> dict[str, KroneckerFactors]:
    """Both factors of every layer in one pass; what is kept does not grow with the text.

    Raises:
        ValueError: an activation or gradient is NaN or Inf, or a layer that the loss does not
            reach (each names the layer).
    """
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, KroneckerFactors] = {}

    def collect(name: str, grad: Tensor, x: Tensor) -> None:
        if name not in factors:
            width = grad.shape[-1]
            zeros = torch.zeros(width, width, dtype=torch.float32, device=grad.device)
            factors[name] = KroneckerFactors(Moments.zeros(x.shape[-1], x.device), zeros)
        factors[name].inputs.add(x, body, first)
        # At padding, whose output predicts nothing, the gradient is zero: nothing to leave out.
        rows = grad.reshape(-1, grad.shape[-1]).float()
        with matmul_precision(grad):
            factors[name].outputs.addmm_(rows.T, rows)

    with _hooked(model, layers, {}, collect):
        for batch in batches(items):
            body, first = position_weights(batch)
            _sampled_loss(model, batch, generator).backward()
            if tick:
                tick(len(batch.index))
    _check_reached(layers, factors)
    for name, found in factors.items():
        squares = (found.inputs.body.diagonal(), found.inputs.first.diagonal(), found.outputs)
        for square in squares:
            if not bool(torch.isfinite(square).all()):
                raise ValueError(f"{name}: the text gives NaN or Inf activations or gradients")
    return factors


def _sampled_loss(model: PreTrainedModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """Cross-entropy, summed over tokens, with labels sampled from the model's own predictions.

    That makes squared gradients the true Fisher information, not the empirical one (Kunstner et al.
    2019, arXiv 1905.12558).
    """
    logits = predicted_logits(model, batch)
    choice = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=generator)
    labels = choice.squeeze(1).to(logits.device)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def _check_reached(layers: Mapping[str, nn.Module], found: Mapping[str, object]) -> None:
    for name, layer in layers.items():
        if name not in found:
            raise ValueError(f"{name} ({type(layer).__name__}) takes no part in the prediction")


@contextmanager
def _hooked(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    edits: Mapping[str, Edit],
    collect: Callable[[str, Tensor, Tensor], None],
) -> Iterator[None]:
    """Call `collect(name, output gradient, input)` in each backward pass, edits being added."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        edit, device = edits.get(name), device_of(layers[name])

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].to(device)
            if edit is not None and not edit.empty:
                output = output + edit.output(x).to(output.device)
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            held = x.detach()
            output.register_hook(lambda grad: collect(name, grad.to(device), held))
            # A copy, which a model may write to (Falcon adds its two branches in place).
            return output.clone()

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
