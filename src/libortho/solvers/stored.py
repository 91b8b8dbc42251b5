"""A model as it will be stored, while the search for its split goes on.

What rounding to INT4 takes away of an edit is remembered again, so a search that looks at the
unrounded model stops too early; INT8 takes nothing to speak of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from libortho.base.streams import BaseStream
from libortho.config import BaseConfig
from libortho.layer import OrthoLinear
from libortho.linear import install, read_linear
from libortho.solvers.problem import Problem


def is_coarse(base: BaseConfig) -> bool:
    """Whether a search must look at the base as it is stored."""
    return base.storage == "int4"


@contextmanager
def as_stored(problem: Problem, bases: Mapping[str, BaseStream]) -> Iterator[None]:
    """The problem's model with these as the bases of all layers, within the block."""
    stored = {
        name: OrthoLinear.from_streams(bases[name], None, read_linear(layer, name)[1])
        for name, layer in problem.layers.items()
    }
    # Installed, not copied into the weights: those of a model on disk are read anew at every call.
    install(problem.model, stored)
    try:
        yield
    finally:
        install(problem.model, problem.layers)
