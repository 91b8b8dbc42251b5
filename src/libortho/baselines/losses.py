"""What each baseline minimises: one frozen config per method, a few lines of maths each.

Every loss is `forget_weight * forget term + retain_weight * retain term` of one forget batch and
one retain batch. Terms, signs and defaults are those of OpenUnlearning (locuslab/open-unlearning,
`gamma` and `alpha` there); `docs/baselines.md` lists what differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from libortho.config import check_count, check_positive
from libortho.data.tokens import Batch, Tokens
from libortho.linear import select_linear
from libortho.scoring import check_vocabulary, sequence_nll, token_nll
from libortho.training import body_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[[Batch, Batch], Tensor]
"""Of a batch of the forget set and one of the retain set: a scalar with a graph behind it."""


# -- terms -----------------------------------------------------------------------------------------


def npo_term(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation, -2/beta E[log sigmoid(-beta log(p / p_ref))].

    Zhang et al. 2024 (arXiv 2404.05868).

    Args:
        nll: (sequences,) NLL of each whole sequence under the model, nats.
        reference: (sequences,) the same under the model before unlearning.
        beta: inverse temperature; towards 0 this is gradient ascent (up to a constant).
    """
    return -2 / beta * nn.functional.logsigmoid(beta * (nll - reference)).mean()


def simnpo_term(mean_nll: Tensor, beta: float, delta: float) -> Tensor:
    """NPO without a reference, by length: -2/beta E[log sigmoid(beta (nll / tokens - delta))].

    Fan et al. 2024 (arXiv 2410.07163); `delta` is the paper's gamma over beta.

    Args:
        mean_nll: (sequences,) mean NLL per token of each sequence, nats.
        beta: inverse temperature.
        delta: margin, nats per token.
    """
    return -2 / beta * nn.functional.logsigmoid(beta * (mean_nll - delta)).mean()


def activation_term(activations: Tensor, wanted: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean squared distance of activations: over the width, then a sequence's tokens, then all.

    Li et al. 2024 (arXiv 2403.03218).

    Args:
        activations: (tokens, width), the sequences' tokens one after another.
        wanted: (tokens, width) or (width,).
        counts: tokens of each sequence.
    """
    squares = (activations - wanted).square().mean(dim=1)
    return torch.stack([tokens.mean() for tokens in squares.split(list(counts))]).mean()


# -- methods ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective(ABC):
    """What the methods share.

    Attributes:
        forget_weight: factor of the forget term.
        retain_weight: factor of the retain term.
    """

    forget_weight: float = 1.0
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive("forget_weight", self.forget_weight)
        check_positive("retain_weight", self.retain_weight, zero=True)

    def parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """The parameters that are trained: all but the input embedding, unless a method says so."""
        return body_parameters(model)

    @abstractmethod
    def begin(self, model: PreTrainedModel, forget: Sequence[Tokens]) -> Loss:
        """The loss, with whatever must be known of `model` before its first step.

        Batches that the loss is given index `forget` as `Batch.index` says.
        """


@dataclass(frozen=True)
class _LikelihoodObjective(Objective):
    # Retain term: mean NLL of all predicted tokens of the retain batch.
    @abstractmethod
    def forget_term(self, nll: Tensor, counts: Sequence[int], reference: Tensor | None) -> Tensor:
        """Of the NLL of all predicted tokens (tokens,), sequence after sequence of `counts`."""

    def references(self, model: PreTrainedModel, forget: Sequence[Tokens]) -> Tensor | None:
        return None

    def begin(self, model: PreTrainedModel, forget: Sequence[Tokens]) -> Loss:
        references = self.references(model, forget)

        def loss(forget_batch: Batch, retain_batch: Batch) -> Tensor:
            nll = token_nll(model, forget_batch)
            own = None if references is None else references[forget_batch.index].to(nll.device)
            forgetting = self.forget_term(nll, forget_batch.counts, own)
            retaining = token_nll(model, retain_batch).mean()
            return self.forget_weight * forgetting + self.retain_weight * retaining

        return loss


@dataclass(frozen=True)
class GradDiff(_LikelihoodObjective):
    """Gradient difference: ascent on the forget set, descent on the retain set.

    Liu et al. 2022 (arXiv 2203.12817), as in TOFU (Maini et al. 2024, arXiv 2401.06121).
    """

    def forget_term(self, nll: Tensor, counts: Sequence[int], reference: Tensor | None) -> Tensor:
        return -nll.mean()


@dataclass(frozen=True)
class NPO(_LikelihoodObjective):
    """NPO with a retain loss (`npo_term`).

    Attributes:
        beta: inverse temperature.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def references(self, model: PreTrainedModel, forget: Sequence[Tokens]) -> Tensor:
        # One pass beforehand: no second model stays in memory.
        return torch.stack([nll.sum() for nll in sequence_nll(model, forget)])

    def forget_term(self, nll: Tensor, counts: Sequence[int], reference: Tensor | None) -> Tensor:
        assert reference is not None
        sums = torch.stack([tokens.sum() for tokens in nll.split(list(counts))])
        return npo_term(sums, reference, self.beta)


@dataclass(frozen=True)
class SimNPO(_LikelihoodObjective):
    """SimNPO with a retain loss (`simnpo_term`).

    Attributes:
        beta: inverse temperature.
        delta: margin, nats per token.
    """

    forget_weight: float = 0.125
    beta: float = 4.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_positive("delta", self.delta, zero=True)

    def forget_term(self, nll: Tensor, counts: Sequence[int], reference: Tensor | None) -> Tensor:
        means = torch.stack([tokens.mean() for tokens in nll.split(list(counts))])
        return simnpo_term(means, self.beta, self.delta)


RMU_DEPTH = 7 / 32
"""Where RMU steers, as a share of the depth: block 7 of the paper's 32-block model."""


@dataclass(frozen=True)
class RMU(Objective):
    """Representation misdirection: steer one block's outputs on forget text to a random vector.

    Li et al. 2024 (arXiv 2403.03218). Retain term: the distance of that block's outputs on retain
    text to what they were. Both are taken at the positions of the predicted tokens.

    Attributes:
        steering: Euclidean norm of the random vector.
        layer: block whose output is steered, from 0; None is 7/32 of the depth, rounded.
        trained_layers: blocks that are trained: this one and those before it.
        modules: linear layers of these blocks whose weights are trained (see `select_linear`).
        seed: of the random vector.
    """

    steering: float = 2.0
    layer: int | None = None
    trained_layers: int = 3
    modules: tuple[str, ...] = ("down_proj",)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("steering", self.steering)
        check_count("trained_layers", self.trained_layers, 1)
        if self.layer is not None:
            check_count("layer", self.layer, 0)

    def _steered(self, blocks: nn.ModuleList) -> int:
        layer = round(RMU_DEPTH * len(blocks)) if self.layer is None else self.layer
        if layer >= len(blocks):
            raise ValueError(f"layer={layer}: the model's blocks are 0 to {len(blocks) - 1}")
        return layer

    def parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """The weights of `modules` in the trained blocks.

        Raises:
            ValueError: no such block, or a name in `modules` that matches nothing.
            TypeError: a name that is not linear.
        """
        blocks = decoder_blocks(model)
        last = self._steered(blocks)
        chosen = blocks[max(0, last + 1 - self.trained_layers) : last + 1]
        weights = []
        for block in chosen:
            for module in select_linear(block, self.modules).values():
                assert isinstance(module.weight, nn.Parameter)
                weights.append(module.weight)
        return weights

    def begin(self, model: PreTrainedModel, forget: Sequence[Tokens]) -> Loss:
        blocks = decoder_blocks(model)
        block = blocks[self._steered(blocks)]
        trained = {id(p) for p in self.parameters(model)}
        # The model before unlearning is this one with the few weights that are trained put back.
        original = {
            name: p.detach().clone() for name, p in model.named_parameters() if id(p) in trained
        }
        generator = torch.Generator().manual_seed(self.seed)
        direction = torch.rand(model.config.get_text_config().hidden_size, generator=generator)
        control = self.steering * direction / direction.norm()

        def loss(forget_batch: Batch, retain_batch: Batch) -> Tensor:
            with torch.no_grad():
                kept = block_outputs(model, block, retain_batch, original)
            steered = block_outputs(model, block, forget_batch)
            forgetting = activation_term(steered, control.to(steered), forget_batch.counts)
            now = block_outputs(model, block, retain_batch)
            retaining = activation_term(now, kept, retain_batch.counts)
            return self.forget_weight * forgetting + self.retain_weight * retaining

        return loss


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a causal LM's transformer blocks.

    Raises:
        ValueError: it has no list of `config.num_hidden_layers` modules.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} blocks, as its config says")


class _Seen(Exception):
    """Ends a forward pass where its result is known."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def block_outputs(
    model: PreTrainedModel,
    block: nn.Module,
    batch: Batch,
    weights: dict[str, Tensor] | None = None,
) -> Tensor:
    """Outputs of one block at the batch's predicted tokens, (predicted tokens, width), fp32.

    What stands above the block is not run: its outputs are all that RMU looks at.

    Args:
        model: a causal LM.
        block: one of its blocks.
        batch: what it reads.
        weights: parameter name -> value to use instead of the model's own.
    """
    check_vocabulary(model, batch)

    def stop(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        raise _Seen(output if isinstance(output, Tensor) else output[0])

    device = next(model.parameters()).device
    inputs = {
        "input_ids": batch.ids.to(device),
        "attention_mask": batch.attention.to(device),
        "use_cache": False,
    }
    handle = block.register_forward_hook(stop)
    # A predicted token's own position is one after the position that predicts it.
    tokens = torch.zeros_like(batch.predicts)
    tokens[:, 1:] = batch.predicts[:, :-1]
    try:
        functional_call(model, weights or {}, args=(), kwargs=inputs)
        raise AssertionError("the block was not run")
    except _Seen as seen:
        return seen.output[tokens.to(seen.output.device)].float()
    finally:
        handle.remove()
