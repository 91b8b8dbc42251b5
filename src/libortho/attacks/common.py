"""What the attacks share: whom they attack, with what in hand, and the shape of what they find."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libortho.alpha import set_alpha
from libortho.checkpoint import is_split, load_split
from libortho.data.examples import Example
from libortho.data.general import general_text
from libortho.data.tokens import Template, Tokens, encode
from libortho.evaluation.entries import number
from libortho.evaluation.finetuned import load_model
from libortho.layer import OrthoLinear
from libortho.linear import install, read_linear

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""


@dataclass(frozen=True)
class Score:
    """One number that an attack gives for one model.

    Attributes:
        name: what was tried; unique within the attack, the same for every model.
        measure: what `value` is, in words.
        value: in [0, 1], more is more recovered; for a measure in steps, steps.
        chance: what is got without any knowledge, where that is known.
        by_question: the values whose mean `value` is, or empty.
        details: what else was found, JSON-ready.
    """

    name: str
    measure: str
    value: float
    chance: float | None = None
    by_question: tuple[float, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def standard_error(self) -> float | None:
        """Of `value` as a mean over questions; None where it is no mean of several."""
        n = len(self.by_question)
        if not all(map(math.isfinite, self.by_question)):  # which statistics.stdev cannot take
            return math.nan
        return statistics.stdev(self.by_question) / math.sqrt(n) if n > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "standard_error": self.standard_error}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """What `to_dict` made; null, for which a file has what is not finite, is NaN."""
        held = {k: v for k, v in data.items() if k != "standard_error"}
        by_question = tuple(number(value) for value in held["by_question"])
        return cls(**{**held, "value": number(held["value"]), "by_question": by_question})


def mean_score(
    name: str,
    measure: str,
    values: Sequence[float],
    chance: float | None = None,
    details: Mapping[str, Any] | None = None,
) -> Score:
    """A score that is the mean over questions."""
    return Score(name, measure, statistics.fmean(values), chance, tuple(values), details or {})


@dataclass(frozen=True)
class Findings:
    """What one attack found out about one model.

    Attributes:
        scores: in the order they are shown.
        missing: what could not be tried, with the reason.
    """

    scores: tuple[Score, ...]
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackData:
    """What the attacker is judged on, and what they have.

    Attributes:
        tokenizer: of all models.
        forget: questions whose answers were to be forgotten, or plain texts.
        retain: the same, that every model memorised.
        holdout: the same, that no model has seen. May be empty.
        template: how a question becomes a prompt.
        pretrained: the public model before it memorised anything, or None.
        unrelated: running texts that have nothing to do with either.

    Raises:
        ValueError: an empty forget or retain set.
    """

    tokenizer: PreTrainedTokenizerBase
    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    holdout: tuple[Example, ...] = ()
    template: Template = "plain"
    pretrained: PreTrainedModel | None = None
    unrelated: tuple[str, ...] = field(default_factory=lambda: tuple(general_text()))

    def __post_init__(self) -> None:
        for name in ("forget", "retain", "holdout"):
            if not getattr(self, name) and name != "holdout":
                raise ValueError(f"the {name} set is empty: expected at least one record")

    def encode(self, examples: Sequence[Example]) -> list[Tokens]:
        """Questions with their answers, and plain texts, in tokens."""
        return [encode(example, self.tokenizer, self.template) for example in examples]


def with_question(examples: Sequence[Example]) -> list[Example]:
    """Those that can be asked: plain texts have no question."""
    return [example for example in examples if example.question is not None]


def note_texts(missing: dict[str, str], what: str, examples: Sequence[Example]) -> None:
    """Note under `what` how many of some records have no question, if any has none."""
    texts = len(examples) - len(with_question(examples))
    if texts:
        has = "has" if texts == 1 else "have"
        missing[what] = f"{texts} of {len(examples)} records {has} no question"


def question_of(example: Example) -> str:
    """The question of an example that has one."""
    assert example.question is not None
    return example.question


class Subject:
    """A model under attack.

    Attributes:
        name: for tables.
        model: as its holder runs it, in evaluation mode; a split model at its alpha.
        layers: names of the linear layers that were split (in other models: that correspond).
    """

    def __init__(self, name: str, model: PreTrainedModel, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        absent = [layer for layer in layers if layer not in modules]
        if absent:
            raise ValueError(
                f"{name} has no layer {absent[0]}, which the split has: expected a model of the "
                "same architecture"
            )
        self.name, self.model, self.layers = name, model, tuple(layers)

    @classmethod
    def load(cls, name: str, source: str, layers: Sequence[str], alpha: float = 0.0) -> Subject:
        """A model from a folder or hub name; a split one at `alpha`.

        Raises:
            OrthoStreamMissing: a split without its ortho file, at an alpha above 0.
            Others: as the loading of models, and as the constructor.
        """
        if is_split(Path(source)):
            model = load_split(source)
            model.set_attn_implementation("eager")  # as `load_model`: all are attacked alike
            set_alpha(model, alpha)
        else:
            model = load_model(source)
        return cls(name, model, layers)

    def dense(self) -> PreTrainedModel:
        """An ordinary copy, which an attacker may change: every split layer as one dense matrix."""
        return dense_copy(self.model)


def dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with every OrthoLinear as nn.Linear, at the alpha that is set.

    Weights are rounded to the model's own dtype. Gradients are off.

    Raises:
        ValueError: a layer's alpha is one per row of a batch.
    """
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    copied = copy.deepcopy(model)
    dense: dict[str, nn.Module] = {}
    for name, layer in copied.named_modules():
        if isinstance(layer, OrthoLinear):
            dense[name] = _as_linear(layer, name, dtype)
    install(copied, dense)
    return copied.eval().requires_grad_(False)


def _as_linear(layer: OrthoLinear, name: str, dtype: torch.dtype) -> nn.Linear:
    if len(layer.default_alpha.rows) > 1:
        raise ValueError(f"{name} has an alpha for each row: expected one number for all")
    weight = layer.effective_weight(layer.default_alpha.rows[0]).to(dtype)
    linear = nn.Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        device=weight.device,
        dtype=dtype,
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


def weight_of(layer: nn.Module, name: str) -> torch.Tensor:
    """The (out_features, in_features) weight of a layer as it runs now, fp32, a copy."""
    if isinstance(layer, OrthoLinear):
        return layer.effective_weight(layer.default_alpha.rows[0])
    return read_linear(layer, name)[0].float().clone()
