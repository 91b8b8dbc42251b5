"""What a solver is given, and where it says how it gets on."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from libortho.data.tokens import Tokens
from libortho.goal import Goal
from libortho.report import LayerSpectrum, Split
from libortho.workers import ThisProcess, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

LayerSolver = Callable[[Tensor], Split]
"""Splits one weight (out_features, in_features) that it needs nothing beside."""


def timed(solve: LayerSolver, weight: Tensor) -> Split:
    """`solve(weight)`, with the seconds that it took."""
    start = time.perf_counter()
    split = solve(weight)
    return dataclasses.replace(split, seconds=time.perf_counter() - start)


@dataclass
class Journal:
    """How a split gets on: told to the caller meanwhile, kept for the report.

    Attributes:
        progress: the caller's, or None.
        seconds: stage -> seconds.
        warnings: what a reader of the report must not miss.
        target: what was aimed at and found, for the report.
        spectrum: layer -> energies of its directions, for the report.
    """

    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    target: dict[str, Any] = field(default_factory=dict)
    spectrum: dict[str, LayerSpectrum] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time to stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)


@dataclass(frozen=True)
class Problem:
    """A model whose layers are to be split. A solver leaves it as it was.

    Attributes:
        model: a causal LM, in eval mode.
        layers: module name -> linear layer that is to be split.
        weights: module name -> its weight, (out_features, in_features), detached.
        forget, retain: sequences.
        general: sequences of general text; empty where the caller has none or the method wants
            none.
        goal: how far to forget and what to say instead; None for a method without an aim.
        journal: where the solver tells of its progress.
        workers: who does what is independent layer by layer, or text by text.
        original: the model that memorised, where `model` is one that did not.
        known: the forget set's probability per token before the split, of the model that memorised;
            None without such a set.
    """

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    weights: dict[str, Tensor]
    forget: list[Tokens]
    retain: list[Tokens]
    general: list[Tokens]
    goal: Goal | None
    journal: Journal
    workers: Workers = field(default_factory=ThisProcess)
    original: PreTrainedModel | None = None
    known: float | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (out_features, in_features)."""
        return {name: (w.shape[0], w.shape[1]) for name, w in self.weights.items()}

    @property
    def widths(self) -> dict[str, int]:
        """Module name -> in_features."""
        return {name: w.shape[1] for name, w in self.weights.items()}

    @property
    def kept(self) -> list[list[Tokens]]:
        """The sets that are to stay as they are: retain and, where there is one, general."""
        return [items for items in (self.retain, self.general) if items]


def batches_of(sets: Sequence[list[Tokens]], tokens: int, seed: int) -> Iterator[list[Tokens]]:
    """Endless batches of about `tokens` tokens, an equal share of each set, freshly shuffled."""
    order = random.Random(seed)
    sources = [_cycle(items, order) for items in sets]
    while True:
        batch: list[Tokens] = []
        for source in sources:
            taken = 0
            while taken * len(sets) < tokens:
                item = next(source)
                batch.append(item)
                taken += len(item.ids)
        yield batch


def _cycle(items: list[Tokens], order: random.Random) -> Iterator[Tokens]:
    while True:
        yield from order.sample(items, len(items))
