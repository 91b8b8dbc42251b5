"""Between stream objects and named tensors: which tensors each form has, and what is valid there.

The base stream of a layer `<name>` of shape (out, in), by the manifest's `base`, with a bias if the
layer has one:

    fp16    <name>.base.qdata F16 (out, in)
    int8    <name>.base.qdata I8 (out, in), <name>.base.scale F32 (out, groups)
    int4    <name>.base.qdata U8 (out, in / 2), <name>.base.scale BF16 (out, groups),
            <name>.base.zero U8 (out, groups)
    any     <name>.bias floating (out)

with groups dividing in; `libortho.kernels.reference` says what the numbers mean. The ortho stream,
by the ortho manifest's kind:

    sparse      <name>.ortho.crow I32 (out + 1), .col I32 (nnz), .values floating (nnz)
    low_rank    <name>.ortho.left floating (out, rank), .right of the same dtype (rank, in)

A new form of the base or ortho stream is added here, and nowhere else in this package.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libortho.base import BaseStream, HalfBase, Int4Base, Int8Base
from libortho.checkpoint.manifest import LayerEntry, OrthoKind
from libortho.checkpoint.tensorfile import TensorEntry, digest, entries_of
from libortho.config import Storage
from libortho.layer import OrthoLinear
from libortho.ortho import LowRankOrtho, OrthoStream, SparseOrtho

FLOATS = ("F16", "BF16", "F32", "F64")

BASE_TENSORS: dict[Storage, tuple[str, ...]] = {
    "fp16": ("qdata",),
    "int8": ("qdata", "scale"),
    "int4": ("qdata", "scale", "zero"),
}
BASE_TYPES: dict[type[BaseStream], Storage] = {HalfBase: "fp16", Int8Base: "int8", Int4Base: "int4"}
ORTHO_TENSORS: dict[OrthoKind, tuple[str, ...]] = {
    "sparse": ("crow", "col", "values"),
    "low_rank": ("left", "right"),
}


def storage_of(base: BaseStream, name: str) -> Storage:
    """The manifest's word for a base stream; TypeError where the format has none."""
    if type(base) in BASE_TYPES:
        return BASE_TYPES[type(base)]
    expected = ", ".join(kind.__name__ for kind in BASE_TYPES)
    raise TypeError(f"{name}.base is a {type(base).__name__}: expected one of {expected}")


def base_names(name: str, layer: LayerEntry) -> dict[str, str]:
    """{"qdata": "<name>.base.qdata", ...} for a layer's base stream."""
    return {part: f"{name}.base.{part}" for part in BASE_TENSORS[layer.base]}


def streams_of(
    layers: Mapping[str, LayerEntry], entries: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """The tensors of the layers' base streams among `entries`, which has them all."""
    names = (full for name, layer in layers.items() for full in base_names(name, layer).values())
    return {name: entries[name] for name in names}


def streams_digest(layers: Mapping[str, OrthoLinear]) -> str:
    """The `streams_sha256` that the manifest of a model with these split layers has."""
    tensors = {}
    for name, layer in layers.items():
        entry = LayerEntry(layer.base.shape, storage_of(layer.base, name))
        for part, full in base_names(name, entry).items():
            tensors[full] = getattr(layer.base, part)
    return digest(entries_of(tensors))


def ortho_names(name: str, kind: OrthoKind) -> dict[str, str]:
    """{"left": "<name>.ortho.left", ...} for a layer's ortho stream."""
    return {part: f"{name}.ortho.{part}" for part in ORTHO_TENSORS[kind]}


def make_base(layer: LayerEntry, tensors: Mapping[str, Tensor]) -> BaseStream:
    """The base stream of a layer from its tensors by short name ("qdata", "scale", "zero")."""
    if layer.base == "fp16":
        return HalfBase(tensors["qdata"])
    if layer.base == "int4":
        return Int4Base(tensors["qdata"], tensors["scale"], tensors["zero"])
    return Int8Base(tensors["qdata"], tensors["scale"])


def make_ortho(layer: LayerEntry, kind: OrthoKind, tensors: Mapping[str, Tensor]) -> OrthoStream:
    """The ortho stream of a layer from its tensors by short name ("left", "crow", ...)."""
    if kind == "low_rank":
        return LowRankOrtho(tensors["left"], tensors["right"])
    return SparseOrtho(tensors["crow"], tensors["col"], tensors["values"], layer.shape)


def check_base_layer(name: str, layer: LayerEntry, entries: Mapping[str, TensorEntry]) -> None:
    """Raise ValueError unless `entries` holds a valid base stream, and bias if any, of `layer`."""
    rows, columns = layer.shape
    names = base_names(name, layer)
    for full in names.values():
        if full not in entries:
            raise ValueError(f"{full} is missing")
    extra = [n for n in entries if n.startswith(f"{name}.") and n not in names.values()]
    for full in extra:
        if full != f"{name}.bias":
            raise ValueError(f"{full} does not belong to a split layer with a {layer.base} base")
        _expect(full, entries[full], FLOATS, (rows,))
    if layer.base == "int4" and columns % 2:
        raise ValueError(f"layers.{name} has {columns} columns: int4 packs two to a byte")
    dtype, width = {
        "fp16": ("F16", columns),
        "int8": ("I8", columns),
        "int4": ("U8", columns // 2),
    }[layer.base]
    _expect(names["qdata"], entries[names["qdata"]], (dtype,), (rows, width))
    if layer.base != "fp16":
        scale = entries[names["scale"]]
        groups = scale.shape[-1] if scale.shape else 0
        _expect(names["scale"], scale, ("F32" if layer.base == "int8" else "BF16",), (rows, groups))
        if groups < 1 or columns % groups:
            raise ValueError(
                f"{names['scale']} has {groups} groups, which do not divide {columns} columns"
            )
        if layer.base == "int4":
            _expect(names["zero"], entries[names["zero"]], ("U8",), (rows, groups))


def check_ortho_layer(
    name: str, layer: LayerEntry, kind: OrthoKind, entries: Mapping[str, TensorEntry]
) -> None:
    """Raise ValueError unless `entries`, which has the right names, fits the layer."""
    rows, columns = layer.shape
    named = {part: (full, entries[full]) for part, full in ortho_names(name, kind).items()}
    if kind == "low_rank":
        left = named["left"][1]
        rank = left.shape[-1] if left.shape else 0
        _expect(*named["left"], FLOATS, (rows, rank))
        _expect(*named["right"], (left.dtype,), (rank, columns))
    if kind == "sparse":
        _expect(*named["crow"], ("I32",), (rows + 1,))
        count = named["col"][1].shape[:1]
        _expect(*named["col"], ("I32",), count or (0,))
        _expect(*named["values"], FLOATS, count)


def _expect(name: str, entry: TensorEntry, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if entry.dtype not in dtypes:
        raise ValueError(f"{name} is {entry.dtype}: expected {' or '.join(dtypes)}")
    if entry.shape != shape:
        raise ValueError(f"{name} is {list(entry.shape)}: expected {list(shape)}")


def check_csr(name: str, crow: Tensor, col: Tensor, columns: int) -> None:
    """Raise ValueError unless (crow, col) index a sparse matrix with `columns` columns.

    Columns must rise within a row: a product adds entries of one place where a dense copy would
    keep one of them, so that a matrix with repeated places would have two meanings.

    Args:
        name: of the layer, for the message.
        crow: (rows + 1,) int32.
        col: (nnz,) int32.
    """
    if int(crow[0]) != 0 or int(crow[-1]) != col.numel():
        raise ValueError(
            f"{name}.ortho.crow runs from {int(crow[0])} to {int(crow[-1])}: expected 0 to "
            f"{col.numel()}, the number of entries"
        )
    if bool((crow.long().diff() < 0).any()):
        raise ValueError(f"{name}.ortho.crow is not monotone: a row would end before it starts")
    if col.numel() == 0:
        return
    low, high = int(col.min()), int(col.max())
    if low < 0 or high >= columns:
        raise ValueError(
            f"{name}.ortho.col holds {low if low < 0 else high}: expected indices in [0, {columns})"
        )
    first_of_row = torch.zeros(col.numel() + 1, dtype=torch.bool)
    first_of_row[crow.long()] = True
    if bool(((col.diff() <= 0) & ~first_of_row[1:-1]).any()):
        raise ValueError(f"{name}.ortho.col does not rise within a row")
