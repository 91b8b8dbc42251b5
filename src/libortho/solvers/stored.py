"""A model as it will be stored, while the search for its split goes on.

What rounding to INT4 takes away of an edit is remembered again, so a search that looks at the
unrounded model stops too early; INT8 takes nothing to speak of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from libortho.base.streams import BaseStream
from libortho.config import BaseConfig
from libortho.scoring import answer_probability, sequence_nll
from libortho.solvers.problem import Problem


def is_coarse(base: BaseConfig) -> bool:
    """Whether a search must look at the base as it is stored."""
    return base.storage == "int4"


def probability_as_stored(problem: Problem, bases: Mapping[str, BaseStream]) -> float:
    """The forget set's probability per token where these are the bases of all layers."""
    with as_stored(problem.weights, bases):
        return answer_probability(sequence_nll(problem.model, problem.forget))


@contextmanager
def as_stored(weights: Mapping[str, Tensor], bases: Mapping[str, BaseStream]) -> Iterator[None]:
    """Within the block the model's weights are what is stored of them."""
    held = {name: weight.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.copy_(bases[name].dequantize())
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(held[name])
