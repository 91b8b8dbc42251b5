"""How the ortho stream is stored: sparse (CSR) or low-rank (two factors)."""

from libortho.ortho.streams import LowRankOrtho, OrthoStream, SparseOrtho

__all__ = ["LowRankOrtho", "OrthoStream", "SparseOrtho"]
