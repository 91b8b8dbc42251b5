"""Sums of x x^T over many x: as rows while they are few, as a square matrix from then on.

A layer of 28,672 inputs has a moment of 3.3 GB. So there is at most one such matrix for each sum,
it is only half computed (it is symmetric), and what has fewer rows than half its width, as a forget
set often has, never becomes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libortho.kernels.dispatch import add_gram_
from libortho.kernels.reference import triangle_panels

CHUNK = 2048
"""Rows that are added in one product: many more would take memory, fewer would take time."""


class Gram:
    """A running sum of x x^T, (width, width), in fp32.

    Args:
        width: of x.
        device: where the sum is kept.

    Attributes:
        width: as given.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self._device = device
        self._matrix: Tensor | None = None
        self._rows: list[Tensor] = []

    @classmethod
    def of(cls, matrix: Tensor) -> Gram:
        """The sum as it stands in `matrix`, (width, width) fp32, which is not copied."""
        made = cls(matrix.shape[0], matrix.device)
        made._matrix = matrix
        return made

    @property
    def _held(self) -> int:
        return sum(len(rows) for rows in self._rows)

    @property
    def rows(self) -> Tensor | None:
        """R, (n, width) fp32 with R^T R the sum, while n <= width / 2; else None."""
        if self._matrix is not None or self._held > self.width // 2:
            return None
        return torch.cat([self._empty(), *(rows.float() for rows in self._rows)])

    @property
    def nbytes(self) -> int:
        """Bytes that are held, of the matrix and of rows that are not in it yet."""
        return sum(part.nbytes for part in (*self._rows, self._matrix) if part is not None)

    def compact_(self) -> None:
        """Hold no more than one (width, width) matrix, as is right for what travels."""
        if self._matrix is not None or self._held > self.width // 2:
            self._fold()

    def add(self, rows: Tensor) -> None:
        """Add R^T R for `rows` R, (n, width) in any floating dtype; they are kept, not copied."""
        if len(rows):
            self._rows.append(rows)
        if self._held >= (CHUNK if self._matrix is not None else max(CHUNK, self.width // 2)):
            self._fold()

    def add_(self, other: Gram) -> None:
        """Add another sum, which must not be used any more: it may be this one's from now on."""
        if self._matrix is None:
            self._matrix = other._matrix
        elif other._matrix is not None:
            self._matrix.add_(other._matrix)
        for rows in other._rows:
            self.add(rows)

    def scale_(self, factor: float) -> None:
        """Multiply the sum by a number >= 0."""
        if self._matrix is None:
            self._rows = [rows.float() * factor**0.5 for rows in self._rows]
        else:
            self._fold()
            self._matrix.mul_(factor)

    def diagonal(self) -> Tensor:
        """(width,) fp32. Not finite exactly where a row was not, or a square is beyond fp32."""
        total = torch.zeros(self.width, dtype=torch.float32, device=self._device)
        if self._matrix is not None:
            total += self._matrix.diagonal()
        for rows in self._rows:
            total += rows.float().square().sum(dim=0)
        return total

    def dense(self) -> Tensor:
        """The sum, (width, width) fp32, symmetric: this object's own memory, not a copy."""
        self._fold()
        matrix = self._matrix
        assert matrix is not None
        for low, high in triangle_panels(self.width):
            matrix[low:high, low:high] = matrix[low:high, low:high].tril() + (
                matrix[low:high, low:high].tril(-1).T
            )
            matrix[:low, low:high] = matrix[low:high, :low].T
        return matrix

    def _empty(self) -> Tensor:
        return torch.zeros(0, self.width, dtype=torch.float32, device=self._device)

    def _fold(self) -> None:
        """Turn what is held as rows into the matrix."""
        if self._matrix is None:
            self._matrix = torch.zeros(
                self.width, self.width, dtype=torch.float32, device=self._device
            )
        if not self._rows:
            return
        # One dtype at a time: rows that came in bf16 multiply exactly in bf16 units.
        for dtype in sorted({rows.dtype for rows in self._rows}, key=str):
            held = torch.cat([rows for rows in self._rows if rows.dtype == dtype])
            for start in range(0, len(held), CHUNK):
                add_gram_(self._matrix, held[start : start + CHUNK])
        self._rows = []
