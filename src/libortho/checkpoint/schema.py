"""Dataclasses as the schema of a JSON file, read strictly.

An unknown key, a missing key or a value of another type is an error, never a guess: a checkpoint
half understood could put a memory where it must not be.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from libortho.errors import CheckpointError


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Turn a ValueError within the block into a CheckpointError that names `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError where it holds anything else."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(plain, dict):
        raise ValueError(f"holds {type(plain).__name__}: expected an object")
    return plain


def decode(hint: Any, value: Any, where: str = "") -> Any:
    """`value`, parsed from JSON, as what the type `hint` says; ValueError naming `where` if not."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_fields(hint, value, where)
    if origin in (Union, UnionType):
        inner = [arg for arg in args if arg is not NoneType]
        return None if value is None and NoneType in args else decode(inner[0], value, where)
    if origin is Literal and type(value) in (str, int) and value in args:
        return value
    if origin is dict and isinstance(value, dict):
        return {key: decode(args[1], item, _join(where, key)) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(hints) == len(value):
            pairs = zip(hints, value, strict=True)
            return tuple(decode(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(pairs))
    if hint is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            raise ValueError(f"{where}: an integer too large for a float") from None
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
    hints = _hints(kind)
    return kind(**{k: decode(hints[k], v, _join(where, k)) for k, v in value.items()})


@functools.cache  # a model has hundreds of layers, and each hint is a text that is evaluated
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
