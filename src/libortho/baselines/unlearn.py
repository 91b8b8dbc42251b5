"""unlearn_: fine-tune a model until it has forgotten enough, and no further.

As in training: bf16 activations and weights with fp32 master copies. Each step takes one batch of
the forget set and one, as large, of the retain set. A run that is killed goes on from its last
saved epoch, and ends where an uninterrupted one would.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from libortho import training
from libortho.baselines.losses import NPO, Objective
from libortho.config import check_count, check_fraction, check_positive
from libortho.data.tokens import Tokens, as_tokens, collate
from libortho.files import replacing
from libortho.memory import PeakMemory
from libortho.scoring import answer_probability, sequence_nll
from libortho.training import MasterWeights, Progress, seeded_dropout, shuffled_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class UnlearnConfig:
    """Recipe of an unlearning fine-tune.

    Attributes:
        objective: the method.
        learning_rate: of AdamW (no weight decay), warmed up over the first epoch.
        max_epochs: passes over the forget set after which it stops in any case.
        batch_size: forget sequences per step, and as many retain sequences.
        landing_steps: bisections of the epoch that crossed `stop_at`: the model ends between its
            weights before and after that epoch, the least way along that still reaches the level.
            0 keeps what the epoch made.
        seed: of the order of the data, and of dropout in a model that has it.
    """

    objective: Objective = field(default_factory=NPO)
    learning_rate: float = 5e-5
    max_epochs: int = 10
    batch_size: int = 8
    landing_steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise TypeError(
                f"objective={self.objective!r}: expected a method's config, such as NPO()"
            )
        check_positive("learning_rate", self.learning_rate)
        check_count("max_epochs", self.max_epochs, 1)
        check_count("batch_size", self.batch_size, 1)
        check_count("landing_steps", self.landing_steps, 0)


@dataclass(frozen=True)
class UnlearnOutcome:
    """What a run did.

    Attributes:
        steps, epochs: optimiser steps, and (started) passes over the forget set.
        probability: the forget set's probability per token at the end (geometric mean over a
            sequence's tokens, averaged over sequences), a fraction.
        probabilities: the same before the first epoch and after each.
        reached: whether `probability` is at most `stop_at`; None without one.
        diverged: whether a gradient became NaN or Inf. The model keeps its last finite weights.
        training_seconds: spent on steps, preparations of the method included.
        measuring_seconds: spent on `probabilities`, landing included. Of an interrupted run, both
            count what its result rests on: not what came after its last saved epoch.
        peak_memory: bytes of host memory that the run took beyond what the process held before it,
            the model among that (see `PeakMemory`).
    """

    steps: int
    epochs: int
    probability: float
    probabilities: tuple[float, ...]
    reached: bool | None
    diverged: bool
    training_seconds: float
    measuring_seconds: float
    peak_memory: int


def unlearn_(
    model: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    config: UnlearnConfig | None = None,
    progress: Progress | None = None,
    stop_at: float | None = None,
    state: Path | None = None,
) -> UnlearnOutcome:
    """Unlearn the forget set in place.

    Args:
        model: a causal LM; afterwards in evaluation mode, without gradients.
        forget: what is to be forgotten.
        retain: what must stay.
        config: the recipe; NPO by default.
        progress: called after every step.
        stop_at: probability per token of the forget set, in (0, 1], at which it stops. Measured on
            the whole set before the first epoch and after each.
        state: a file of the caller's for this very model, data and config. Where it exists, the run
            goes on from it; it is written after an epoch, no oftener than every
            `training.SAVE_SECONDS`. At its end the run leaves "<state>.end" in its place, which
            takes a repeated call there at once. The caller removes it.

    Raises:
        ValueError: an empty set, `stop_at` out of range, a token id outside the vocabulary, or a
            block or layer of the method's config that the model does not have.
        TypeError: an item that is not `Tokens` or ids, or a layer that is not linear.
    """
    config = config or UnlearnConfig()
    weights = config.objective.parameters(model)
    return train_(model, weights, forget, retain, config, progress, stop_at, state)


def train_(
    model: PreTrainedModel,
    weights: Sequence[nn.Parameter],
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    config: UnlearnConfig,
    progress: Progress | None = None,
    stop_at: float | None = None,
    state: Path | None = None,
) -> UnlearnOutcome:
    """`unlearn_` for given `weights` that `model` depends on, its own parameters or others."""
    if stop_at is not None:
        check_fraction("stop_at", stop_at)
    run = _Run(
        model,
        weights,
        as_tokens(forget, "forget"),
        as_tokens(retain, "retain"),
        config,
        progress or (lambda stage, done, total: None),
        stop_at,
        state,
    )
    model.requires_grad_(False)
    model.eval()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with PeakMemory() as memory:
            run(memory)
    finally:
        model.eval()
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    final = run.so_far.probability
    return UnlearnOutcome(
        steps=run.so_far.steps,
        epochs=run.so_far.epochs,
        probability=final,
        probabilities=tuple(run.so_far.probabilities),
        reached=None if stop_at is None else final <= stop_at,
        diverged=run.so_far.diverged,
        training_seconds=run.so_far.seconds["training"],
        measuring_seconds=run.so_far.seconds["measuring"],
        peak_memory=max(run.so_far.peak_memory, memory.growth),
    )


@dataclass
class _SoFar:
    """What a run has come to: what its outcome is made of, and what a state file keeps of it."""

    steps: int = 0
    epochs: int = 0
    probability: float = math.nan
    probabilities: list[float] = field(default_factory=list)
    diverged: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "measuring": 0.0})
    peak_memory: int = 0


class _Run:
    """One run: what its stages share."""

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Sequence[nn.Parameter],
        forget: list[Tokens],
        retain: list[Tokens],
        config: UnlearnConfig,
        tell: Progress,
        stop_at: float | None,
        state: Path | None,
    ) -> None:
        self.model, self.weights = model, weights
        self.forget, self.retain = forget, retain
        self.config, self.tell = config, tell
        self.level = -math.inf if stop_at is None else stop_at
        self.lands = stop_at is not None and config.landing_steps > 0
        self.state = state
        self.order = random.Random(config.seed)
        self.so_far = _SoFar()

    @contextmanager
    def clock(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.so_far.seconds[kind] += time.perf_counter() - start

    def measure(self) -> float:
        with self.clock("measuring"):
            self.model.eval()
            self.so_far.probability = answer_probability(sequence_nll(self.model, self.forget))
        return self.so_far.probability

    def __call__(self, memory: PeakMemory) -> None:
        if self.state is None:
            self.train(memory)
            return
        ended = self.state.with_name(self.state.name + ".end")
        if ended.is_file():
            self.take_up_end(ended)
            return
        self.train(memory)
        self.so_far.peak_memory = max(self.so_far.peak_memory, memory.growth)
        with replacing(ended) as partial:
            held = [weight.detach() for weight in self.weights]
            torch.save({"weights": held, "so_far": asdict(self.so_far)}, partial)
        self.state.unlink(missing_ok=True)

    def train(self, memory: PeakMemory) -> None:
        resumed = self.state is not None and self.state.is_file()
        if not resumed:
            self.so_far.probabilities.append(self.measure())
            if self.so_far.probability <= self.level:
                return
        with self.clock("training"):
            # What a method must know of the model before its first step is learnt from that model
            # again: the weights that were trained are put in place after.
            self.loss = self.config.objective.begin(self.model, self.forget)
            self.optimizer = MasterWeights(self.weights)
        if resumed:
            self.take_up()
        before: list[Tensor] = []
        saved = time.monotonic()
        while self.so_far.epochs < self.config.max_epochs and not self.so_far.diverged:
            if self.lands:
                before = [w.detach().clone() for w in self.weights]
            self.epoch()
            self.so_far.probabilities.append(self.measure())
            if self.so_far.probability <= self.level:
                if self.lands:
                    self.land(before)
                return
            if self.state is not None and time.monotonic() - saved >= training.SAVE_SECONDS:
                self.so_far.peak_memory = max(self.so_far.peak_memory, memory.growth)
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        assert self.state is not None
        more: dict[str, Any] = {
            "so_far": asdict(self.so_far),
            "order": self.order.getstate(),
        }
        self.optimizer.save(self.state, more)

    def take_up(self) -> None:
        assert self.state is not None
        held = self.optimizer.load(self.state)
        self.so_far = _SoFar(**held["so_far"])
        self.order.setstate(held["order"])

    @torch.no_grad()
    def take_up_end(self, ended: Path) -> None:
        held = torch.load(ended, weights_only=True)
        self.so_far = _SoFar(**held["so_far"])
        for weight, value in zip(self.weights, held["weights"], strict=True):
            weight.copy_(value)

    def epoch(self) -> None:
        config, so_far = self.config, self.so_far
        per_epoch = math.ceil(len(self.forget) / config.batch_size)
        so_far.epochs += 1
        with self.clock("training"), seeded_dropout(self.model, config.seed, so_far.epochs):
            self.model.train()
            for rows in shuffled_batches(self.forget, config.batch_size, self.order):
                partners = self.order.choices(range(len(self.retain)), k=len(rows))
                loss = self.loss(collate(self.forget, rows), collate(self.retain, partners))
                loss.backward()
                try:
                    warm = min(1.0, (so_far.steps + 1) / per_epoch)
                    self.optimizer.step(config.learning_rate * warm)
                except FloatingPointError:
                    so_far.diverged = True
                    return
                so_far.steps += 1
                self.tell(
                    f"epoch {so_far.epochs}, forget probability {so_far.probability:.3f}",
                    so_far.steps,
                    per_epoch * config.max_epochs,
                )

    def land(self, before: Sequence[Tensor]) -> None:
        """The least part of the last epoch's way that still reaches the level (bisection)."""
        beyond = [w.detach().clone() for w in self.weights]
        low, high, best = 0.0, 1.0, self.so_far.probability
        for _ in range(self.config.landing_steps):
            share = (low + high) / 2
            self.place(before, beyond, share)
            if self.measure() <= self.level:
                high, best = share, self.so_far.probability
            else:
                low = share
        self.place(before, beyond, high)
        self.so_far.probability = best

    @torch.no_grad()
    def place(self, before: Sequence[Tensor], beyond: Sequence[Tensor], share: float) -> None:
        for weight, old, new in zip(self.weights, before, beyond, strict=True):
            weight.copy_(torch.lerp(old.float(), new.float(), share))
