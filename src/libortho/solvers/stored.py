"""A model as it will be stored, while the search for its split goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from libortho.base.streams import BaseStream


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
