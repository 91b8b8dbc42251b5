"""separate_: split a model into what it may say and what it memorised. Read top to bottom.

check -> measure the retain metric -> find the edit -> quantise -> install -> measure again
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import libortho
from libortho.base import quantize
from libortho.calibration import second_moments
from libortho.config import BaseConfig, FactorDtype, to_dict
from libortho.data.general import general_text
from libortho.data.tokens import Template, Tokens, as_tokens, collate
from libortho.forgetting import feedback, output_sensitivity
from libortho.goal import Goal, choose_goal
from libortho.layer import OrthoLinear
from libortho.linear import install, read_linear, select_linear
from libortho.measures import measure_streams, spread, untouched_layers
from libortho.methods import method_of
from libortho.methods.geometric import (
    Descent,
    GeometricConfig,
    LowRankEdit,
    Metric,
    parameter_budget,
    project_edit,
    retain_metric,
)
from libortho.methods.spectral import SpectralConfig, rank_ratio_for, split_spectral
from libortho.ortho import LowRankOrtho
from libortho.report import LayerReport, SeparationReport, Split, measure_layer
from libortho.scoring import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERAL_TOKENS = 8_000
"""Tokens of general text in the retain metric: several times a small model's layer width."""

SENSITIVITY_TOKENS = 1024
"""Tokens over which a layer's output sensitivity is averaged: one number, soon stable."""

MOST_ABOVE = 0.05
"""Probability above its target at which the forget set never counts as forgotten."""

LANDING_STEPS = 3
"""Bisections of the last step, which would otherwise forget more than was asked for."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass(frozen=True)
class SeparationConfig:
    """Configuration of a whole split.

    Attributes:
        method: a method's config; its class says which method.
        target_modules: the linear layers to split (see `select_linear`).
        general_text: add the embedded general text to the retain metric, beside the retain set.
        template: how questions become prompts, where text is given.
    """

    method: GeometricConfig | SpectralConfig = field(default_factory=GeometricConfig)
    target_modules: tuple[str, ...] = ("down_proj",)
    general_text: bool = True
    template: Template = "plain"

    def __post_init__(self) -> None:
        method_of(self.method)
        if isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", (self.target_modules,))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))


def separate_(
    model: PreTrainedModel,
    forget: Sequence[Any],
    retain: Sequence[Any],
    config: SeparationConfig | GeometricConfig | SpectralConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    before: PreTrainedModel | None = None,
    unseen: Sequence[Any] | None = None,
    progress: Progress | None = None,
) -> SeparationReport:
    """Split the targeted layers of a causal LM in place; alpha starts at 0.

    Args:
        model: a Hugging Face causal LM. An exception leaves it as it was.
        forget: what is to be forgotten: `Example`s or strings (with a tokenizer), `Tokens`, id
            sequences, or mappings with "input_ids" and "labels".
        retain: what must stay, in the same forms. A few hundred sequences will do; general text is
            added from the package, if there is a tokenizer and the config does not say otherwise.
        config: a `SeparationConfig`, or a method's config for the default target modules.
        tokenizer: the model's.
        before: the model before it memorised (same vocabulary). The forget set is then moved to
            what that model would say, given a few retain examples to show it the form.
        unseen: sequences comparable to the forget set that the model has never seen: they say how
            unfamiliar the forget set should become. Without `before`, `unseen` and the config's
            `target_nll`, `DEFAULT_TARGET_NLL` is aimed at.
        progress: called as work goes on.

    Returns:
        The measured report. `report.reached` is False where the budget did not suffice; the model
        is split all the same, and the caller decides.

    Raises:
        ValueError: an empty set, a target that matches nothing, NaN/Inf weights, a layer that is
            split already, a token id outside the vocabulary, a budget too small for one direction.
        TypeError: a target that is not linear, or items of an unknown form.
    """
    if config is None:
        config = SeparationConfig()
    elif not isinstance(config, SeparationConfig):
        config = SeparationConfig(method=config)
    work = _Work(model, config, progress)
    forget_items = work.tokens(forget, "forget", tokenizer)
    retain_items = work.tokens(retain, "retain", tokenizer)
    unseen_items = None if unseen is None else work.tokens(unseen, "unseen", tokenizer)
    with _evaluating(model), nullcontext() if before is None else _evaluating(before):
        if isinstance(config.method, SpectralConfig):
            work.split_each(config.method)
        else:
            general = work.general(tokenizer)
            with work.stage("goal"):
                work.tell("goal", 0, 1)
                goal = choose_goal(
                    model,
                    forget_items,
                    retain_items,
                    before=before,
                    unseen=unseen_items,
                    target_nll=config.method.target_nll,
                )
                work.tell("goal", 1, 1)
            work.split_together(config.method, goal, forget_items, retain_items, general)
        return work.finish(forget_items, retain_items)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout within the block; afterwards every module is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Work:
    """One run of `separate_`: what its stages share."""

    def __init__(
        self, model: PreTrainedModel, config: SeparationConfig, progress: Progress | None
    ) -> None:
        self.model = model
        self.config = config
        self._progress = progress
        self.layers = select_linear(model, config.target_modules)
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}
        for name, layer in self.layers.items():
            self.weights[name], self.biases[name] = read_linear(layer, name)
        self.new_layers: dict[str, OrthoLinear] = {}
        self.seconds: dict[str, float] = {}
        self.target: dict[str, Any] = {}
        self.goal: Goal | None = None
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def tell(self, stage: str, done: int, total: int) -> None:
        if self._progress:
            self._progress(stage, done, total)

    def tokens(
        self, items: Sequence[Any], label: str, tokenizer: PreTrainedTokenizerBase | None
    ) -> list[Tokens]:
        result = as_tokens(items, label, tokenizer, self.config.template)
        for position, item in enumerate(result):
            try:
                check_vocabulary(self.model, collate([item], [0]))
            except ValueError as error:
                raise ValueError(f"{label}[{position}]: {error}") from None
        return result

    def general(self, tokenizer: PreTrainedTokenizerBase | None) -> list[Tokens]:
        if not self.config.general_text:
            return []
        if tokenizer is None:
            self.warnings.append(
                "no general text protects the model, for want of a tokenizer: pass tokenizer=, or "
                "general_text=False with a retain set that is broad enough"
            )
            return []
        items = self.tokens(general_text(), "general text", tokenizer)
        return spread([items], GENERAL_TOKENS)

    # -- spectral: every layer for itself ------------------------------------------------------

    def split_each(self, method: SpectralConfig) -> None:
        ratios = rank_ratio_for(method.rank_ratio, list(self.layers))
        with self.stage("solve"):
            for done, (name, weight) in enumerate(self.weights.items()):
                self.tell("split layers", done, len(self.weights))
                start = time.perf_counter()
                one = dataclasses.replace(method, rank_ratio=ratios[name])
                split = split_spectral(weight, one, name)
                self._add(name, "spectral", split, time.perf_counter() - start)
            self.tell("split layers", len(self.weights), len(self.weights))

    # -- geometric: all layers under one budget --------------------------------------------------

    def split_together(
        self,
        method: GeometricConfig,
        goal: Goal,
        forget: list[Tokens],
        retain: list[Tokens],
        general: list[Tokens],
    ) -> None:
        self.goal = goal
        shapes = {name: (w.shape[0], w.shape[1]) for name, w in self.weights.items()}
        budget = parameter_budget(shapes, method.ortho_ratio)
        if budget < min(sum(shape) for shape in shapes.values()):
            raise ValueError(
                f"ortho_ratio={method.ortho_ratio} pays for {budget} numbers, fewer than one "
                f"direction of the smallest layer ({min(sum(s) for s in shapes.values())})"
            )
        metrics = self._metrics(method, retain, general)
        with self.stage("solve"):
            if method.edit == "descent":
                edits = self._descend(method, goal, forget, metrics, shapes, budget)
            else:
                edits = self._project(goal, forget, metrics, budget)
        with self.stage("quantise"):
            for done, (name, weight) in enumerate(self.weights.items()):
                self.tell("quantise", done, len(self.weights))
                split = edit_streams(weight, edits[name], method.base, method.ortho_dtype)
                self._add(name, "geometric", split, 0.0)
            self.tell("quantise", len(self.weights), len(self.weights))

    def _metrics(
        self, method: GeometricConfig, retain: list[Tokens], general: list[Tokens]
    ) -> dict[str, Metric]:
        total = len(retain) + len(general)
        seen = 0

        def tick(count: int) -> None:
            nonlocal seen
            seen += count
            self.tell("statistics", seen, total)

        with self.stage("statistics"):
            moments = [
                second_moments(self.model, self.layers, items, tick=tick)
                for items in (retain, general)
                if items
            ]
        with self.stage("sensitivity"):
            self.tell("sensitivity", 0, 1)
            sensitivity = output_sensitivity(
                self.model,
                self.layers,
                spread([items for items in (retain, general) if items], SENSITIVITY_TOKENS),
                method.seed,
            )
            self.tell("sensitivity", 1, 1)
        metrics = {}
        with self.stage("solve"):
            for done, name in enumerate(self.layers):
                self.tell("factor", done, len(self.layers))
                mean = sum((m[name].mean() for m in moments[1:]), moments[0][name].mean())
                scale = max(sensitivity[name], 1e-30)
                metrics[name] = retain_metric(mean / len(moments), method.ridge, scale, name)
            self.tell("factor", len(self.layers), len(self.layers))
        return metrics

    def _descend(
        self,
        method: GeometricConfig,
        goal: Goal,
        forget: list[Tokens],
        metrics: dict[str, Metric],
        shapes: dict[str, tuple[int, int]],
        budget: int,
    ) -> dict[str, LowRankEdit]:
        descent = Descent(metrics, shapes, budget, method.seed)
        steps = method.find_steps + method.fit_steps
        edits = best = descent.edits()
        best_probability = math.inf
        for step in range(steps + 1):
            previous, edits = edits, descent.edits()
            now = feedback(self.model, self.layers, forget, goal.targets, edits)
            if not math.isfinite(now.loss):
                raise ValueError("the forget set's loss is not finite")
            stage = f"descent, probability {now.probability:.3f} -> {goal.level:.3f}"
            self.tell(stage, step, steps)
            if now.probability < best_probability:
                best, best_probability = edits, now.probability
            if now.probability <= goal.level:
                best = self._land(goal, forget, previous, edits)
                break
            if step == steps:
                break
            if step < method.find_steps:
                descent.find(now.loss, now.gradients, method.step)
            else:
                descent.fit(now.gradients, method.rate)
        self.tell(stage, steps, steps)
        self.target["steps"] = step
        return best

    def _land(
        self,
        goal: Goal,
        forget: list[Tokens],
        before: dict[str, LowRankEdit],
        beyond: dict[str, LowRankEdit],
    ) -> dict[str, LowRankEdit]:
        """The least part of the step that crossed the level which still reaches it (bisection)."""
        if any(before[name].rank != edit.rank for name, edit in beyond.items()):
            return beyond  # the step chose other directions: there is no way between the two
        low, high, best = 0.0, 1.0, beyond
        for done in range(LANDING_STEPS):
            self.tell("landing", done, LANDING_STEPS)
            share = (low + high) / 2
            edits = {name: before[name].toward(edit, share) for name, edit in beyond.items()}
            now = feedback(self.model, self.layers, forget, goal.targets, edits)
            if now.probability <= goal.level:
                high, best = share, edits
            else:
                low = share
        self.tell("landing", LANDING_STEPS, LANDING_STEPS)
        return best

    def _project(
        self, goal: Goal, forget: list[Tokens], metrics: dict[str, Metric], budget: int
    ) -> dict[str, LowRankEdit]:
        weights = [torch.ones(item.targets) for item in forget]
        moments = second_moments(self.model, self.layers, forget, weights=weights)
        means = {name: m.mean() for name, m in moments.items()}
        # The least damage that forgets enough: bisect the share of the budget that is spent.
        low, high = 0.0, 1.0
        for step in range(6):
            share = 1.0 if step == 0 else (low + high) / 2
            edits = project_edit(self.weights, metrics, means, int(share * budget))
            now = feedback(self.model, self.layers, forget, goal.targets, edits)
            self.tell(f"projection, p {now.probability:.3f} -> {goal.level:.3f}", step, 6)
            if now.probability <= goal.level:
                high, best = share, edits
            elif step == 0:
                return edits
            else:
                low = share
        self.tell("projection", 6, 6)
        return best

    # -- install and measure -----------------------------------------------------------------------

    def _add(self, name: str, method: str, split: Split, seconds: float) -> None:
        weight, bias = self.weights[name], self.biases[name]
        report = measure_layer(name, method, weight, split, seconds=seconds, note=split.note)
        self.new_layers[name] = OrthoLinear.from_streams(split.base, split.ortho, bias, report)

    def finish(self, forget: list[Tokens], retain: list[Tokens]) -> SeparationReport:
        install(self.model, self.new_layers)
        try:
            return self._measure(forget, retain)
        except BaseException:
            install(self.model, self.layers)
            raise

    def _measure(self, forget: list[Tokens], retain: list[Tokens]) -> SeparationReport:
        with self.stage("measure"):
            measured = measure_streams(self.model, forget, retain, self.tell)
        probability = measured.probability
        if self.goal is not None and isinstance(self.config.method, GeometricConfig):
            tolerance = self.config.method.tolerance
            aimed, wanted = self.goal.source, self.goal.level
            reached = probability["0.0"] <= wanted + min(tolerance * wanted, MOST_ABOVE)
            self.target |= {"tolerance": tolerance}
        else:
            # spectral aims at nothing; the least one can ask is that something was forgotten
            aimed = "half the probability at alpha 1 (this method has no aim of its own)"
            wanted = 0.5 * probability["1.0"]
            reached = probability["0.0"] < wanted
        self.target |= {
            "aimed_at": aimed,
            "probability": wanted,
            "reached_probability": probability["0.0"],
        }
        if not reached:
            self.warnings.append(
                f"the forget set is NOT forgotten: probability per token {probability['0.0']:.3f} "
                f"at alpha 0, aimed at {wanted:.3f}"
            )
        layers: tuple[LayerReport, ...] = tuple(
            layer.report for layer in self.new_layers.values() if layer.report is not None
        )
        return SeparationReport(
            layers=layers,
            skipped=untouched_layers(self.model),
            forget_ppl=measured.forget_ppl,
            retain_ppl=measured.retain_ppl,
            target=self.target,
            reached=reached,
            warnings=tuple(self.warnings),
            seconds=self.seconds,
            settings={
                "libortho": libortho.__version__,
                "torch": torch.__version__,
                "target_modules": list(self.config.target_modules),
                "general_text": self.config.general_text,
                "method": to_dict(self.config.method),
                "forget_sequences": len(forget),
                "retain_sequences": len(retain),
            },
        )


def edit_streams(
    weight: Tensor, edit: LowRankEdit, base: BaseConfig, ortho_dtype: FactorDtype
) -> Split:
    """base = quantise(weight + edit), ortho = -edit, for a weight (out_features, in_features)."""
    ortho = LowRankOrtho.from_factors(-edit.left, edit.right, getattr(torch, ortho_dtype))
    # What is stored of the factors, rounding included, is what the base must lack.
    return Split(quantize(weight.float() - ortho.dense(), base), ortho)


def separation_report(model: nn.Module) -> SeparationReport:
    """The per-layer report of a model that is split already, without any measurement of text."""
    from libortho.alpha import ortho_layers

    found = ortho_layers(model)
    layers = tuple(
        dataclasses.replace(layer.report, name=name)
        for name, layer in found.items()
        if layer.report is not None
    )
    return SeparationReport(layers=layers, skipped=untouched_layers(model))
