"""`libortho.json`: what a split checkpoint holds. The dataclasses below *are* its schema.

Reading is strict: an unknown key, a missing key or a value of another type is an error, never a
guess, because a checkpoint half understood could put a memory where it must not be.
"""

from __future__ import annotations

import dataclasses
import json
import os
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from libortho.config import Storage
from libortho.errors import CheckpointError
from libortho.report import LayerReport

FORMAT: Literal["libortho-split"] = "libortho-split"
FORMAT_VERSION = 1

MANIFEST = "libortho.json"
BASE = "base.safetensors"
ORTHO = "ortho.safetensors"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
REPORT = "report.json"

OrthoKind = Literal["sparse", "low_rank"]
FloatName = Literal["float16", "bfloat16", "float32", "float64"]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of `base.safetensors`.

    Attributes:
        dtype: as safetensors names it ("F32", "BF16", "I8", "U8").
        shape: its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerEntry:
    """One split layer.

    Attributes:
        shape: (out_features, in_features).
        base: storage of the base stream; `checkpoint.streams` lists the tensors of each.
        ortho: form of the ortho stream; None where the layer was saved without one.
        report: how it was split, when that is known.
    """

    shape: tuple[int, int]
    base: Storage
    ortho: OrthoKind | None
    report: LayerReport | None


@dataclass(frozen=True)
class Manifest:
    """All of `libortho.json`.

    Attributes:
        format, format_version: what this file is; a reader knows one version.
        libortho_version: of the writer, for people.
        base_sha256: hex digest of `base.safetensors`, all bytes. The ortho file carries the same
            digest in its metadata, so that it fits no other base.
        ortho_sha256: hex digest of `ortho.safetensors`, None where no layer has an ortho stream.
        layers: module name -> split layer, in the model's order.
        tensors: every tensor of `base.safetensors` by name.
        tied: name -> name in `tensors` whose tensor stands in this place too.
        buffer_dtypes: floating buffers that are not stored but computed from the config (rotary
            frequencies), name -> dtype that they had.
        files: the other files of the checkpoint, relative paths with "/".
    """

    format: Literal["libortho-split"]
    format_version: int
    libortho_version: str
    base_sha256: str
    ortho_sha256: str | None
    layers: dict[str, LayerEntry]
    tensors: dict[str, TensorEntry]
    tied: dict[str, str]
    buffer_dtypes: dict[str, FloatName]
    files: tuple[str, ...]

    def to_json(self) -> str:
        """The text of `libortho.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def is_split(folder: PathLike) -> bool:
    """True where `folder` holds a `libortho.json`, whatever is in it."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: PathLike) -> Manifest:
    """The checked manifest of a checkpoint; reads no tensors (see `verify_split` for those).

    Raises:
        CheckpointError: not a folder, a file is missing, or `libortho.json` is malformed, of
            another version, or contradicts itself.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: expected the folder of a split checkpoint")
    for name in (MANIFEST, CONFIG, BASE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: not a whole split checkpoint")
    path = folder / MANIFEST
    with blame(path):
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None
        _check_version(plain)
        manifest: Manifest = _decode(Manifest, plain, "")
        _check_consistency(manifest)
    return manifest


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Turn a ValueError within the block into a CheckpointError that names `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_version(plain: Any) -> None:
    # Before anything else: a newer format may differ in any other key.
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ValueError(f"expected an object with format={FORMAT!r}")
    version = plain.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"format_version={version!r}: this version of libortho reads {FORMAT_VERSION}"
        )


def _check_consistency(manifest: Manifest) -> None:
    if not manifest.layers:
        raise ValueError("layers is empty: a split checkpoint has at least one")
    for name, layer in manifest.layers.items():
        if min(layer.shape) < 1:
            raise ValueError(f"layers.{name}.shape={layer.shape}: expected two numbers above 0")
    for key, digest in (("base", manifest.base_sha256), ("ortho", manifest.ortho_sha256)):
        if digest is not None and (len(digest) != 64 or set(digest) - set(string.hexdigits)):
            raise ValueError(f"{key}_sha256={digest!r}: expected 64 hexadecimal digits")
    if (manifest.ortho_sha256 is None) != all(x.ortho is None for x in manifest.layers.values()):
        raise ValueError("ortho_sha256 and the layers' ortho streams: one is there, one is not")
    for name, source in manifest.tied.items():
        if source not in manifest.tensors or name in manifest.tensors:
            raise ValueError(f"tied.{name}={source!r}: expected the name of a stored tensor")
    for name in (*manifest.tensors, *manifest.tied):
        if is_ortho_name(name):
            raise ValueError(f"{name} is an ortho tensor: the base must not hold any")
    for file in manifest.files:
        _check_file_name(file)


def is_ortho_name(name: str) -> bool:
    """True for tensors of an ortho stream, `<module>.ortho.<tensor>`."""
    return "ortho" in name.split(".")


def _check_file_name(file: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in file:
        raise ValueError(f"files holds {file!r}: expected a path inside the folder")
    if path.name in (MANIFEST, BASE, ORTHO):
        raise ValueError(f"files holds {file!r}, which is not listed there")


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value`, parsed from JSON, as what the type `hint` says; ValueError naming `where` if not."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_fields(hint, value, where)
    if origin in (Union, UnionType):
        inner = [arg for arg in args if arg is not NoneType]
        return None if value is None and NoneType in args else _decode(inner[0], value, where)
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if origin is dict and isinstance(value, dict):
        return {key: _decode(args[1], item, _join(where, key)) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(hints) == len(value):
            pairs = zip(hints, value, strict=True)
            return tuple(_decode(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(pairs))
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str) and type(value) is hint:
        return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{where}={value!r}: expected {wanted}")


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} is {value!r}: expected an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"unknown key {_join(where, unknown[0])!r}")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise ValueError(f"key {_join(where, name)!r} is missing")
    hints = get_type_hints(kind)
    return kind(**{k: _decode(hints[k], v, _join(where, k)) for k, v in value.items()})


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
