"""Two layers' shapes, inputs to them, and what an edit of them costs."""

from __future__ import annotations

import torch
from torch import Tensor

from libortho.methods.edits import LowRankEdit

SHAPES = {"a": (9, 7), "b": (5, 12)}


def moment(width: int, samples: int = 40) -> Tensor:
    """(width, width) fp32: x^T x / samples of Gaussian x."""
    x = torch.randn(samples, width)
    return x.T @ x / samples


def cost(edits: dict[str, LowRankEdit]) -> int:
    """Numbers in the factors of all layers."""
    return sum(e.left.numel() + e.right.numel() for e in edits.values())
