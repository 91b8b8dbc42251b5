"""OrthoLinear, a linear layer in two streams, and the original's front door to it.

    y = base(x) + alpha * ortho(x) + bias

The layer knows how to run a split. Which numbers go into which stream is a method's business
(`libortho.methods`); the constructor below runs the original recipe, `from_streams` takes any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from libortho import alpha as _alpha
from libortho.base import BaseStream
from libortho.config import FactorDtype, Scale, Selection, Storage, Svd
from libortho.errors import OrthoStreamMissing
from libortho.linear import read_linear
from libortho.methods.spectral import (
    RankRatio,
    SpectralConfig,
    rank_ratio_for,
    spectral_base,
    split_spectral,
)
from libortho.ortho import OrthoStream
from libortho.report import LayerReport, measure_layer


class OrthoLinear(nn.Module):
    """A linear layer as base stream + alpha * ortho stream.

    `OrthoLinear(layer, ...)` runs the original, data-free recipe on one layer (see
    `SpectralConfig` and `spectral_base` for every argument and its meaning).
    `OrthoLinear.from_streams` installs a split made by any method.

    Attributes:
        base: the dense stream.
        ortho: the memorised stream, or None in a base-only deployment.
        bias: (out_features,) buffer or None; it belongs to the base.
        default_alpha: what `set_alpha` wrote; starts at 0, the safe state.
        report: how the layer was split, with its errors and sizes.
        locked: its folder has an ortho stream that was not loaded, so that `ortho` is None.

    Raises:
        TypeError: `original_layer` is not a linear layer (nn.Linear or transformers' Conv1D).
        ValueError: its weight holds NaN or Inf, or an argument is out of range.
    """

    base: BaseStream
    ortho: OrthoStream | None
    bias: Tensor | None
    report: LayerReport | None
    locked: bool

    def __init__(
        self,
        original_layer: nn.Module,
        ortho_ratio: float = 0.01,
        rank_ratio: float = 0.95,
        use_low_rank: bool = True,
        *,
        scale: Scale | None = None,
        svd: Svd = "exact",
        selection: Selection = "relative",
        storage: Storage = "int8",
        group_size: int | None = None,
        ortho_dtype: FactorDtype = "float16",
    ) -> None:
        config = SpectralConfig(
            ortho_ratio=ortho_ratio,
            rank_ratio=rank_ratio,
            use_low_rank=use_low_rank,
            svd=svd,
            selection=selection,
            base=spectral_base(storage, scale, group_size),
            ortho_dtype=ortho_dtype,
        )
        weight, bias = read_linear(original_layer, "original_layer")
        split = split_spectral(weight, config)
        self._install(split.base, split.ortho, bias)
        self.report = measure_layer("", "spectral", weight, split)

    @classmethod
    def from_streams(
        cls,
        base: BaseStream,
        ortho: OrthoStream | None,
        bias: Tensor | None = None,
        report: LayerReport | None = None,
    ) -> OrthoLinear:
        """A layer from two streams of one shape, however they were made.

        Args:
            base: (out_features, in_features).
            ortho: the same shape, or None for a base-only layer.
            bias: (out_features,) or None; copied.
            report: the split's report for this layer, when there is one.

        Raises:
            ValueError: the shapes differ.
        """
        if ortho is not None and ortho.shape != base.shape:
            raise ValueError(f"the base is {base.shape} and the ortho stream is {ortho.shape}")
        if bias is not None and bias.shape != (base.shape[0],):
            raise ValueError(f"bias is {tuple(bias.shape)}, expected ({base.shape[0]},)")
        layer = cls.__new__(cls)
        layer._install(base, ortho, bias)
        layer.report = report
        return layer

    def _install(self, base: BaseStream, ortho: OrthoStream | None, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.base = base
        self.ortho = ortho
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.default_alpha = _alpha.ZERO
        self.report = None
        self.locked = False
        self._key = _alpha.new_key(self)

    def _replicate_for_data_parallel(self) -> OrthoLinear:
        # DataParallel runs its replicas in threads of their own, where no scope of the caller's is.
        alpha = _alpha.current_alpha(self)
        if len(alpha.rows) > 1:
            raise ValueError(
                f"alpha has {len(alpha.rows)} values, one per row, and DataParallel deals the rows "
                "out: give one alpha for all, or use one device"
            )
        replica: OrthoLinear = super()._replicate_for_data_parallel()
        replica.default_alpha = alpha
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy, by deepcopy or from another process, has an alpha of its own.
        self._key = _alpha.new_key(self)

    @property
    def in_features(self) -> int:
        return self._stream.shape[1]

    @property
    def out_features(self) -> int:
        return self._stream.shape[0]

    @property
    def _stream(self) -> BaseStream:
        # `self.base` without nn.Module's attribute lookup, which a small layer's call feels.
        return self._modules["base"]  # type: ignore[return-value]

    def require_ortho(self, alpha: _alpha.Alpha, name: str = "") -> None:
        """Raise OrthoStreamMissing where `alpha` needs an ortho stream that is not there."""
        if self.ortho is None and not alpha.is_zero:
            if self.locked:
                raise OrthoStreamMissing(
                    f"the ortho stream of {name or 'this layer'} is locked: the base was loaded "
                    "alone and runs at alpha = 0; load the folder with its key to go above it"
                )
            raise OrthoStreamMissing(
                f"{name or 'this layer'} has no ortho stream: a base-only deployment runs at "
                "alpha = 0 alone; load the ortho file to go above it"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) of any floating dtype -> (..., out_features) in that dtype.

        Raises:
            ValueError: the last dimension is not in_features, or alpha's rows do not fit the batch.
            OrthoStreamMissing: alpha > 0 and there is no ortho stream.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}, expected (..., {self.in_features})")
        if torch.compiler.is_compiling():
            y = self.base(x)
            if self.ortho is not None:
                y = _alpha.add_scaled(y, self.ortho(x), self._key)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if torch._C._is_tracing() and self.ortho is not None:
            raise RuntimeError(
                "a trace would hold the alpha of this moment for good: use torch.compile or "
                "torch.export, whose graphs ask for it, or trace a base without its ortho stream"
            )
        alpha, bias = _alpha.current_alpha(self), self._buffers["bias"]
        if alpha.is_zero:
            return self._stream(x, bias)
        ortho = self._modules.get("ortho")
        if ortho is None:
            self.require_ortho(alpha)
        assert isinstance(ortho, OrthoStream)
        return self._stream(x, bias, ortho.tensors, alpha.tensor(x))

    def effective_weight(self, alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """base + alpha * ortho as one dense (out_features, in_features) matrix."""
        checked = _alpha.check_alpha(alpha)
        self.require_ortho(checked)
        weight = self.base.dequantize(dtype)
        if self.ortho is not None and not checked.is_zero:
            weight = weight + checked.rows[0] * self.ortho.dense(dtype)
        return weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, default_alpha={self.default_alpha.rows}"
        )


def replace_linear_layers(
    model: nn.Module,
    target_modules: str | list[str] | tuple[str, ...] = ("down_proj",),
    ratio: float = 0.005,
    rank_ratio: RankRatio = 0.95,
    use_low_rank: bool = True,
    *,
    scale: Scale | None = None,
    svd: Svd = "exact",
    selection: Selection = "relative",
    storage: Storage = "int8",
    group_size: int | None = None,
    ortho_dtype: FactorDtype = "float16",
) -> nn.Module:
    """The original recipe on every matching layer of a model, in place; alpha starts at 0.

    Args:
        model: any module; changed in place, and untouched where anything raises.
        target_modules: module-name suffixes or regular expressions (see `select_linear`).
        ratio: `ortho_ratio` of every layer, a fraction.
        rank_ratio: a fraction, or a mapping from module names (suffix or regular expression) to
            fractions that covers every matched layer.
        use_low_rank, svd, selection, ortho_dtype: as in `SpectralConfig`.
        storage, scale, group_size: as in `spectral_base`.

    Returns:
        The same `model`. `separation_report(model)` has the per-layer numbers.

    Raises:
        ValueError, TypeError: as `select_linear` and `SpectralConfig`.
    """
    from libortho.linear import install, select_linear

    replacements: dict[str, OrthoLinear] = {}
    selected = select_linear(model, target_modules)
    ratios = rank_ratio_for(rank_ratio, list(selected))
    for name, module in selected.items():
        config = SpectralConfig(
            ortho_ratio=ratio,
            rank_ratio=ratios[name],
            use_low_rank=use_low_rank,
            svd=svd,
            selection=selection,
            base=spectral_base(storage, scale, group_size),
            ortho_dtype=ortho_dtype,
        )
        weight, bias = read_linear(module, name)
        split = split_spectral(weight, config, name)
        report = measure_layer(name, "spectral", weight, split)
        replacements[name] = OrthoLinear.from_streams(split.base, split.ortho, bias, report)
    install(model, replacements)
    return model
