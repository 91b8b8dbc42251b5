"""Fine-tuning until answers are known: how the default job makes a model memorise something.

bf16 activations and weights with fp32 master copies: on a CPU with bf16 units this is about twice
as fast as fp32, and small updates are not lost to rounding. A long fine-tune that is killed goes on
from its last saved epoch, and ends where an uninterrupted one would.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from libortho.config import check_count, check_fraction, check_positive
from libortho.data.tokens import Tokens, collate
from libortho.files import replacing
from libortho.linalg import seeded
from libortho.scoring import token_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""

SAVE_SECONDS = 60.0
"""Least time between two saved states: a short fine-tune is repeated sooner than it is written."""

EPOCHS = 1_000_003
"""More than any fine-tune has, so that no two (seed, epoch) draw the same dropout."""


@dataclass(frozen=True)
class MemoriseConfig:
    """Recipe of the fine-tune.

    Attributes:
        target: mean answer probability over an epoch at which training stops, a fraction. Each
            answer is scored before its own step, so the model ends above it.
        max_epochs: epochs after which it stops in any case.
        learning_rate: of AdamW (no weight decay), warmed up over the first epoch.
        batch_size: sequences per step.
        seed: of the order of the data, and of dropout in a model that has it.
    """

    target: float = 0.88
    max_epochs: int = 14
    learning_rate: float = 2e-4
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("target", self.target)
        check_count("max_epochs", self.max_epochs, 1)
        check_positive("learning_rate", self.learning_rate)
        check_count("batch_size", self.batch_size, 1)


def memorise_(
    model: PreTrainedModel,
    items: Sequence[Tokens],
    config: MemoriseConfig,
    progress: Progress | None = None,
    state: Path | None = None,
) -> int:
    """Fine-tune `model` in place on the predicted tokens of `items`.

    The input embedding (and an output layer tied to it) stays as it is: a third of a small model's
    parameters, of which an answer uses few.

    Args:
        model: a causal LM. It ends in evaluation mode, and trains what it trained before.
        items: sequences to memorise.
        config: the recipe.
        progress: called after every step.
        state: a file of the caller's for this very model, data and recipe. Where it exists, the
            fine-tune goes on from it; it is written after an epoch, atomically, no oftener than
            every `SAVE_SECONDS`. The caller removes it when it has kept the model.

    Returns:
        Epochs run, those before an interruption included.

    Raises:
        FloatingPointError: a gradient is NaN or Inf.
    """
    order = random.Random(config.seed)
    with _body_training(model) as weights:
        optimizer = MasterWeights(weights)
        steps_per_epoch = math.ceil(len(items) / config.batch_size)
        step, epoch = 0, 0
        if state is not None and state.is_file():
            epoch = int(optimizer.load(state)["epoch"])
            step = epoch * steps_per_epoch
            for _ in range(epoch):  # the order of the data is drawn anew, up to where it was
                shuffled_batches(items, config.batch_size, order)
        saved = time.monotonic()
        while epoch < config.max_epochs:
            epoch += 1
            probabilities: list[float] = []
            with seeded_dropout(model, config.seed, epoch):
                for rows in shuffled_batches(items, config.batch_size, order):
                    step += 1
                    batch = collate(items, rows)
                    nll = token_nll(model, batch)
                    nll.mean().backward()
                    optimizer.step(config.learning_rate * min(1.0, step / steps_per_epoch))
                    probabilities += [
                        math.exp(-float(x.mean())) for x in nll.detach().split(batch.counts)
                    ]
                    if progress:
                        mean = sum(probabilities) / len(probabilities)
                        progress(
                            f"epoch {epoch}, answer probability {mean:.2f}",
                            step,
                            steps_per_epoch * config.max_epochs,
                        )
            if sum(probabilities) / len(probabilities) >= config.target:
                break
            if state is not None and time.monotonic() - saved >= SAVE_SECONDS:
                optimizer.save(state, {"epoch": epoch})
                saved = time.monotonic()
    return epoch


@contextmanager
def seeded_dropout(model: nn.Module, seed: int, epoch: int) -> Iterator[None]:
    """Dropout within the block depends on these two numbers alone.

    So that a fine-tune that goes on from an epoch ends where an uninterrupted one does. The
    caller's random state is left as it is.
    """
    with seeded(seed * EPOCHS + epoch, *{p.device for p in model.parameters()}):
        yield


@contextmanager
def _body_training(model: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """The body's parameters, alone trainable, in training mode; after it in evaluation mode.

    Which parameters are trainable is the caller's matter, and so it is afterwards what it was.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = body_parameters(model)
    model.train()
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        model.eval()
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def body_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """All parameters but the input embedding (and an output layer tied to it)."""
    embedding = {id(p) for p in model.get_input_embeddings().parameters()}
    return [p for p in model.parameters() if id(p) not in embedding]


class MasterWeights:
    """AdamW (no weight decay, gradients clipped to norm 1) on fp32 copies of some weights."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._masters = [w.detach().float().clone().requires_grad_() for w in weights]
        self._optimizer = torch.optim.AdamW(self._masters, weight_decay=0.0, fused=True)

    def step(self, learning_rate: float) -> None:
        """One step along the weights' gradients, which are cleared.

        Raises:
            FloatingPointError: a gradient is NaN or Inf; the weights stay as they were.
        """
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = nn.utils.clip_grad_norm_(self._masters, 1.0)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"the gradient's norm is {float(norm)}: training diverged")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._write()

    def save(self, path: Path, more: Mapping[str, Any]) -> None:
        """Write masters, optimiser state and `more`, whole or not at all."""
        own = {"masters": self._masters, "optimizer": self._optimizer.state_dict()}
        with replacing(path) as partial:
            torch.save({**more, **own}, partial)

    def load(self, path: Path) -> dict[str, Any]:
        """Take up what `save` wrote; returns what was in it besides."""
        held: dict[str, Any] = torch.load(path, weights_only=True)
        self._optimizer.load_state_dict(held["optimizer"])
        with torch.no_grad():
            for master, value in zip(self._masters, held["masters"], strict=True):
                master.copy_(value)
        self._write()
        return {key: held[key] for key in held if key not in ("masters", "optimizer")}

    def _write(self) -> None:
        with torch.no_grad():
            for master, weight in zip(self._masters, self._weights, strict=True):
                weight.copy_(master)


def shuffled_batches(items: Sequence[Tokens], size: int, order: random.Random) -> list[list[int]]:
    """Indices of all items, `size` a batch, in an order drawn anew from `order` at each call."""
    # Lengths are sorted within windows of eight batches: little padding, and still a fresh mix of
    # batches every epoch.
    index = list(range(len(items)))
    order.shuffle(index)
    window = size * 8
    batches = []
    for start in range(0, len(index), window):
        part = sorted(index[start : start + window], key=lambda i: len(items[i].ids))
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    order.shuffle(batches)
    return batches
