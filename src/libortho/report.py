"""What a split did, measured: per layer, in total, and what was asked for but not reached."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from libortho.base import BaseStream
from libortho.kernels import reference
from libortho.ortho import LowRankOrtho, OrthoStream


@dataclass(frozen=True)
class Split:
    """The two streams of one weight, as a method hands them over.

    Attributes:
        base, ortho: streams of one shape (out_features, in_features).
        note: what a reader of the report should know of this layer ("" for nothing), such as a
            fallback that was taken.
        seconds: time spent on this layer alone, where it can be told apart.
    """

    base: BaseStream
    ortho: OrthoStream
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class LayerReport:
    """One layer's split.

    Attributes:
        name: module name.
        method: name of the method.
        shape: (out_features, in_features).
        base_error: ||base - W||_F / ||W||_F, a fraction.
        final_error: ||base + ortho - W||_F / ||W||_F, a fraction.
        kind: "sparse" or "low_rank".
        ortho_numel: stored ortho numbers (CSR entries, or elements of both factors).
        rank: of a low-rank stream, else None.
        base_bytes, ortho_bytes: bytes as stored, scales and indices included.
        seconds: time spent on this layer alone, where it can be told apart.
        note: as in `Split`.
    """

    name: str
    method: str
    shape: tuple[int, int]
    base_error: float
    final_error: float
    kind: str
    ortho_numel: int
    rank: int | None
    base_bytes: int
    ortho_bytes: int
    seconds: float = 0.0
    note: str = ""

    @property
    def numel(self) -> int:
        """Parameters of the original layer."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """Ortho numbers over the layer's parameters, a fraction."""
        return self.ortho_numel / self.numel


def measure_layer(name: str, method: str, weight: Tensor, split: Split) -> LayerReport:
    """Compare a split with the weight (out_features, in_features) that it was made from."""
    base, ortho = split.base, split.ortho
    dense = ortho.dense()
    base_square = final_square = weight_square = torch.zeros((), dtype=torch.float64)
    for rows in reference.row_blocks(weight.shape[0], weight.shape[1], 4):
        block = weight[rows].float()
        error = base.dequantize(torch.float32, rows) - block
        weight_square = weight_square + block.double().square().sum().cpu()
        base_square = base_square + error.double().square().sum().cpu()
        final_square = final_square + (error + dense[rows]).double().square().sum().cpu()
    norm = float(weight_square.sqrt()) or 1.0
    return LayerReport(
        name=name,
        method=method,
        shape=base.shape,
        base_error=float(base_square.sqrt()) / norm,
        final_error=float(final_square.sqrt()) / norm,
        kind=ortho.kind,
        ortho_numel=ortho.numel,
        rank=ortho.rank if isinstance(ortho, LowRankOrtho) else None,
        base_bytes=base.nbytes,
        ortho_bytes=ortho.nbytes,
        seconds=split.seconds,
        note=split.note,
    )


@dataclass(frozen=True)
class LayerSpectrum:
    """Energies of the directions of one layer's low-rank split, strongest on retain data first.

    The energy of a direction on some text is the mean squared norm of what it adds to the layer's
    output there, times the layer's sensitivity (the mean squared norm of the loss gradient at its
    output), so that layers compare.

    Attributes:
        forget: at the positions that predict the forget set.
        retain: on the retain data, as the retain metric has it (with its ridge).
    """

    forget: tuple[float, ...]
    retain: tuple[float, ...]


_VERDICTS = {
    True: "reached",
    False: "NOT REACHED within the ortho budget",
    None: "no forget set was given: nothing is claimed of one",
}


@dataclass(frozen=True)
class SeparationReport:
    """A whole model's split.

    Attributes:
        layers: one report per split layer, in the model's order.
        skipped: module name -> why it was not split. (A targeted layer is never skipped; this
            lists layers that the method left without an ortho part, and linear layers that were
            not targeted.)
        forget_ppl, retain_ppl: alpha ("0.0", "1.0") -> perplexity, empty where nothing was given.
        target: what was aimed at, in words and numbers. "probability" is the forget set's per token
            that is wanted at alpha 0, "reached_probability" what it is; a search that moved the
            first with the unseen text has what it was before as "settled_probability".
        reached: False where the forget set could not be forgotten within the budget; None where no
            forget set was given, or nothing was measured, so that nothing is claimed of one.
        warnings: what a reader must not miss.
        spectrum: layer -> energies of its directions, where the method is low-rank and knows them.
        seconds: stage -> seconds.
        settings: configuration and chosen values, JSON-ready.
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    forget_ppl: dict[str, float] = field(default_factory=dict)
    retain_ppl: dict[str, float] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    reached: bool | None = None
    warnings: tuple[str, ...] = ()
    spectrum: dict[str, LayerSpectrum] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def _norm_mean(self, attribute: str) -> float:
        # Layers are averaged by size; a large layer's error matters as much as it is large.
        total = sum(layer.numel for layer in self.layers) or 1  # no layers, no error
        return sum(getattr(x, attribute) * x.numel for x in self.layers) / total

    @property
    def base_error(self) -> float:
        """Mean base error over the layers, weighted by their parameters."""
        return self._norm_mean("base_error")

    @property
    def final_error(self) -> float:
        """Mean final error over the layers, weighted by their parameters."""
        return self._norm_mean("final_error")

    @property
    def density(self) -> float:
        """Ortho numbers over the parameters of all split layers."""
        total = sum(x.numel for x in self.layers) or 1
        return sum(x.ortho_numel for x in self.layers) / total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the totals stand beside the layers."""
        plain = dataclasses.asdict(self)
        plain["layers"] = [
            {**layer, "density": report.density}
            for layer, report in zip(plain["layers"], self.layers, strict=True)
        ]
        plain["totals"] = {
            "base_error": self.base_error,
            "final_error": self.final_error,
            "density": self.density,
            "base_bytes": sum(x.base_bytes for x in self.layers),
            "ortho_bytes": sum(x.ortho_bytes for x in self.layers),
        }
        return plain

    def __str__(self) -> str:
        head = (
            "layer",
            "method",
            "base err",
            "final err",
            "density",
            "rank",
            "base KiB",
            "ortho KiB",
        )
        rows = [
            (
                x.name,
                x.method,
                f"{x.base_error:.4f}",
                f"{x.final_error:.4f}",
                f"{x.density:.3%}",
                "-" if x.rank is None else str(x.rank),
                f"{x.base_bytes / 1024:.0f}",
                f"{x.ortho_bytes / 1024:.1f}",
            )
            for x in self.layers
        ]
        totals = self.to_dict()["totals"]
        rows.append(
            (
                f"total ({len(self.layers)})",
                "",
                f"{self.base_error:.4f}",
                f"{self.final_error:.4f}",
                f"{self.density:.3%}",
                str(sum(x.rank or 0 for x in self.layers)),
                f"{totals['base_bytes'] / 1024:.0f}",
                f"{totals['ortho_bytes'] / 1024:.1f}",
            )
        )
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        for label, values in (("forget", self.forget_ppl), ("retain", self.retain_ppl)):
            if values:
                text = ", ".join(f"alpha {a}: {v:.4g}" for a, v in values.items())
                lines.append(f"{label} perplexity  {text}")
        if self.target:
            text = ", ".join(f"{key}: {_short(value)}" for key, value in self.target.items())
            lines.append(f"target  {text}")
            lines.append(_VERDICTS[self.reached])
        lines += [f"{x.name}: {x.note}" for x in self.layers if x.note]
        lines += [f"not split: {text}" for text in _alike(self.skipped)]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def _alike(skipped: Mapping[str, str]) -> list[str]:
    """A line for all modules of the same name but for its numbers, and the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in skipped.items():
        groups.setdefault((re.sub(r"\d+", "*", name), why), []).append(name)
    return [
        f"{names[0]} ({why})" if len(names) == 1 else f"{pattern} ({why}; {len(names)} of them)"
        for (pattern, why), names in groups.items()
    ]
