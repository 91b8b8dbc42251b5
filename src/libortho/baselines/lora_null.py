"""lora-null: the null hypothesis of this package's own claim.

If any unlearning LoRA, merged and quantised as base and negated as ortho stream, were as good a
split as one found for the purpose, the purpose would be idle. So: W + BA, trained by NPO with a
retain loss; base = quantise(W + BA), ortho = -BA. alpha = 0 is the unlearned model, alpha = 1 the
original.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import libortho
from libortho.baselines.losses import NPO
from libortho.baselines.unlearn import UnlearnConfig, UnlearnOutcome, train_
from libortho.config import (
    BaseConfig,
    FactorDtype,
    check_choice,
    check_fraction,
    check_positive,
    to_dict,
)
from libortho.data.tokens import Tokens, as_tokens
from libortho.layer import OrthoLinear
from libortho.linear import install, read_linear, select_linear
from libortho.measures import measure_streams, untouched_layers
from libortho.methods.edits import LowRankEdit
from libortho.report import LayerReport, SeparationReport, measure_layer
from libortho.solvers.geometric import edit_streams
from libortho.training import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "lora-null"


@dataclass(frozen=True)
class LoraNullConfig:
    """Configuration of the null baseline.

    Attributes:
        training: of the LoRA; its objective is NPO.
        ortho_ratio: parameters of A and B over those of their layer at most, a fraction. Every
            layer gets the largest rank that this pays for.
        target_modules: the linear layers that get a LoRA and are split (see `select_linear`).
        scale: factor of BA, the `lora_alpha / r` of Hu et al. 2021 (arXiv 2106.09685).
        base: how the base is stored.
        ortho_dtype: dtype of the factors, as stored.
    """

    training: UnlearnConfig = field(default_factory=lambda: UnlearnConfig(learning_rate=1e-3))
    ortho_ratio: float = 0.01
    target_modules: tuple[str, ...] = ("down_proj",)
    scale: float = 2.0
    base: BaseConfig = field(default_factory=BaseConfig)
    ortho_dtype: FactorDtype = "float16"

    def __post_init__(self) -> None:
        if not isinstance(self.training.objective, NPO):
            kind = type(self.training.objective).__name__
            raise TypeError(f"objective is {kind}: the null baseline is trained with NPO")
        check_fraction("ortho_ratio", self.ortho_ratio)
        check_positive("scale", self.scale)
        check_choice("ortho_dtype", self.ortho_dtype, FactorDtype)
        if isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", (self.target_modules,))


@dataclass(frozen=True)
class LoraNullOutcome:
    """What a run did.

    Attributes:
        training: of the LoRA, before it was merged and quantised.
        report: of the split. `reached` is that of the training; the probability that quantising
            left is `target["reached_probability"]`.
    """

    training: UnlearnOutcome
    report: SeparationReport


def lora_null_(
    model: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    config: LoraNullConfig | None = None,
    progress: Progress | None = None,
    stop_at: float | None = None,
    state: Path | None = None,
) -> LoraNullOutcome:
    """Train an unlearning LoRA and split the targeted layers by it, in place; alpha starts at 0.

    Args:
        model: a causal LM; afterwards in evaluation mode, without gradients. An exception leaves
            its weights and layers as they were.
        forget, retain, progress, stop_at, state: as `unlearn_`; the state is the LoRA's.
        config: the recipe.

    Raises:
        ValueError: an empty set, a target that matches nothing, a layer so small that
            `ortho_ratio` does not pay for rank 1, NaN/Inf weights, a token id outside the
            vocabulary, `stop_at` out of range.
        TypeError: a target that is not linear.
    """
    config = config or LoraNullConfig()
    forget, retain = as_tokens(forget, "forget"), as_tokens(retain, "retain")
    layers = select_linear(model, config.target_modules)
    loras = {
        name: Lora.start(module, name, config, config.training.seed + position)
        for position, (name, module) in enumerate(layers.items())
    }
    factors = [factor for lora in loras.values() for factor in (lora.down, lora.up)]
    with adapted(layers, loras):
        training = train_(model, factors, forget, retain, config.training, progress, stop_at, state)
    clock = time.perf_counter()
    splits: dict[str, OrthoLinear] = {}
    reports: list[LayerReport] = []
    for name, module in layers.items():
        weight, bias = read_linear(module, name)
        split = edit_streams(weight, loras[name].edit(), config.base, config.ortho_dtype)
        reports.append(measure_layer(name, METHOD, weight, split))
        splits[name] = OrthoLinear.from_streams(split.base, split.ortho, bias, reports[-1])
    quantised = time.perf_counter()
    install(model, splits)
    try:
        tell = progress or (lambda stage, done, total: None)
        measured = measure_streams(model, forget, retain, tell)
    except BaseException:
        install(model, layers)
        raise
    report = SeparationReport(
        layers=tuple(reports),
        skipped=untouched_layers(model),
        forget_ppl=measured.forget_ppl,
        retain_ppl=measured.retain_ppl,
        target={
            "aimed_at": "all epochs" if stop_at is None else "the level that was given",
            "probability": stop_at,
            "trained_probability": training.probability,
            "reached_probability": measured.probability["0.0"],
        },
        reached=training.reached is not False,
        seconds={
            "train": training.training_seconds,
            "measure forgetting": training.measuring_seconds,
            "quantise": quantised - clock,
            "measure": time.perf_counter() - quantised,
        },
        settings={
            "libortho": libortho.__version__,
            "torch": torch.__version__,
            "target_modules": list(config.target_modules),
            "method": to_dict(config),
            "training": dataclasses.asdict(training),
            "forget_sequences": len(forget),
            "retain_sequences": len(retain),
        },
    )
    return LoraNullOutcome(training, report)


@dataclass(frozen=True)
class Lora:
    """scale * up @ down, to be added to a weight (out_features, in_features).

    Attributes:
        down: (rank, in_features) fp32, "A".
        up: (out_features, rank) fp32, "B"; zeros at the start.
        scale: a factor.
    """

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    @classmethod
    def start(cls, module: nn.Module, name: str, config: LoraNullConfig, seed: int) -> Lora:
        """The adapter of one layer before its training.

        Raises:
            ValueError: the budget does not pay for rank 1, or NaN/Inf weights.
        """
        weight, _ = read_linear(module, name)
        out_features, in_features = weight.shape
        rank = int(config.ortho_ratio * weight.numel()) // (out_features + in_features)
        if rank < 1:
            least = (out_features + in_features) / weight.numel()
            raise ValueError(
                f"ortho_ratio={config.ortho_ratio} pays for no rank in {name}, "
                f"{out_features} x {in_features}: expected at least {least:.4g}"
            )
        generator = torch.Generator().manual_seed(seed)
        down = torch.rand(rank, in_features, generator=generator) * 2 - 1
        # The authors' initialisation: uniform within 1 / sqrt(in_features), and zeros.
        down = (down / math.sqrt(in_features)).to(weight.device)
        up = torch.zeros(out_features, rank, device=weight.device)
        return cls(nn.Parameter(down), nn.Parameter(up), config.scale)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x."""
        return self.scale * ((x @ self.down.to(x.dtype).T) @ self.up.to(x.dtype).T)

    def edit(self) -> LowRankEdit:
        """What it adds to the weight."""
        return LowRankEdit(self.scale * self.up.detach(), self.down.detach())


@contextmanager
def adapted(layers: Mapping[str, nn.Module], loras: Mapping[str, Lora]) -> Iterator[None]:
    """Within the block, each layer's output has its LoRA's added; weights are not touched."""

    def hook_of(lora: Lora) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + lora(args[0])

        return hook

    handles = [layer.register_forward_hook(hook_of(loras[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
