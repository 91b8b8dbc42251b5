"""The stored forms of the ortho stream, the part of a layer that holds what was memorised."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from libortho.kernels import reference
from libortho.stored import StoredModule


class OrthoStream(StoredModule):
    """A small (out_features, in_features) matrix kept apart from the base.

    Attributes:
        kind: "sparse" or "low_rank".
        shape: (out_features, in_features).
    """

    kind: Literal["sparse", "low_rank"]
    shape: tuple[int, int]

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What kernels take: (left, right), or (crow, col, values)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x @ O.T`; x (..., in_features) -> (..., out_features), in the dtype of x."""
        return reference.ortho_linear(x, self.tensors)

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (out_features, in_features) matrix, for reports and tests."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """Stored numbers that make up the stream: entries of CSR, or of both factors."""


class SparseOrtho(OrthoStream):
    """CSR: `crow` (out_features + 1,) int32, `col` (nnz,) int32, `values` (nnz,)."""

    kind = "sparse"
    crow: Tensor
    col: Tensor
    values: Tensor

    def __init__(self, crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (int(shape[0]), int(shape[1]))
        self.register_buffer("crow", crow)
        self.register_buffer("col", col)
        self.register_buffer("values", values)

    @classmethod
    def from_dense(cls, matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> SparseOrtho:
        """Keep the entries of `matrix` (out_features, in_features) where `mask` is True."""
        row, col = mask.nonzero(as_tuple=True)
        shape = (matrix.shape[0], matrix.shape[1])
        return cls.from_entries(row * shape[1] + col, matrix[row, col].to(dtype), shape)

    @classmethod
    def from_entries(cls, places: Tensor, values: Tensor, shape: tuple[int, int]) -> SparseOrtho:
        """Entries by their places row * in_features + column, (nnz,) int64, ascending.

        Raises:
            ValueError: a value is NaN or Inf, as one that is beyond the range of its dtype becomes.
        """
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"an ortho value is not finite in {values.dtype}: beyond its range, store it as "
                "float32"
            )
        counts = torch.bincount(places // shape[1], minlength=shape[0])
        crow = torch.zeros(shape[0] + 1, dtype=torch.int32, device=places.device)
        crow[1:] = counts.cumsum(0)
        return cls(crow, (places % shape[1]).to(torch.int32), values, shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        stored = self._buffers  # nn.Module's attribute lookup costs more than a small product
        return stored["crow"], stored["col"], stored["values"]  # type: ignore[return-value]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        matrix = torch.zeros(self.shape, dtype=dtype, device=self.values.device)
        matrix[reference.csr_rows(self.crow), self.col.long()] = self.values.to(dtype)
        return matrix

    @property
    def numel(self) -> int:
        return self.values.numel()

    def extra_repr(self) -> str:
        return f"sparse, shape={self.shape}, nnz={self.numel}"


class LowRankOrtho(OrthoStream):
    """Two factors: `left` (out_features, rank) and `right` (rank, in_features); rank may be 0."""

    kind = "low_rank"
    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        if left.shape[1] != right.shape[0]:
            raise ValueError(
                f"left is {tuple(left.shape)} and right is {tuple(right.shape)}: "
                "expected (out_features, rank) and (rank, in_features)"
            )
        self.shape = (left.shape[0], right.shape[1])
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRankOrtho:
        """Store left @ right in `dtype`, each pair of factors scaled to equal norms.

        Balanced factors keep a narrow dtype away from its limits: only the product is given.

        Raises:
            ValueError: a balanced factor is beyond the range of `dtype`.
        """
        left, right = left.double(), right.double()
        left_norm, right_norm = left.norm(dim=0), right.norm(dim=1)
        alive = (left_norm > 0) & (right_norm > 0)
        balance = torch.where(alive, (right_norm / left_norm).sqrt(), torch.ones_like(left_norm))
        left, right = left * balance, right / balance.unsqueeze(1)
        largest = max((float(f.abs().max()) for f in (left, right) if f.numel()), default=0.0)
        if largest > torch.finfo(dtype).max:
            raise ValueError(
                f"an ortho factor reaches {largest:.6g}, beyond {dtype}; store it as float32"
            )
        return cls(left.to(dtype).contiguous(), right.to(dtype).contiguous())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._buffers["left"], self._buffers["right"]  # type: ignore[return-value]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.left.to(dtype) @ self.right.to(dtype)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def numel(self) -> int:
        return self.left.numel() + self.right.numel()

    def extra_repr(self) -> str:
        return f"low_rank, shape={self.shape}, rank={self.rank}"
