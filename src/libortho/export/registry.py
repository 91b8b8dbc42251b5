"""The export targets by name, and what every one of them reports.

A target is a frozen config and a function that writes a split model into an empty folder; one file
each, registered at its end.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libortho.errors import LibOrthoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExportReport:
    """What an export holds and what it cost.

    Attributes:
        target: the target's name.
        layers: split layers that were exported.
        weight_error: the largest, over the layers, of ||exported - exact||_F / ||exact||_F, where
            exact is the weight in float32 as LibOrtho computes it: what storing it in the target's
            form costs.
        adapters: folder (or file) of each adapter -> its alpha. Each holds the memory.
        empty: split layers whose ortho stream holds nothing; no adapter has them.
        max_rank: the largest rank of a LoRA adapter (vLLM's `max_lora_rank` must reach it); None
            where there is none.
        notes: what a user has to know about these files.
        streams_sha256: of the split that it was made from, as that split's manifest has it.
    """

    target: str
    layers: int
    weight_error: float
    adapters: dict[str, float] = dataclasses.field(default_factory=dict)
    empty: tuple[str, ...] = ()
    max_rank: int | None = None
    notes: tuple[str, ...] = ()
    streams_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return dataclasses.asdict(self)


Writer = Callable[
    ["PreTrainedModel", Path, Any, "PreTrainedTokenizerBase | None"],
    ExportReport,
]
"""(split model, empty folder, the target's config, tokenizer or None) -> report."""


@dataclass(frozen=True)
class Target:
    """One export target.

    Attributes:
        name: as `libortho export --to` takes it.
        config: its config class.
        write: writes the export.
    """

    name: str
    config: type
    write: Writer


TARGETS: dict[str, Target] = {}
"""Target name -> target."""


def register(name: str, config: type, write: Writer) -> None:
    """Make `write` the target `name`, configured by `config`; a name is taken once."""
    if name in TARGETS:
        raise ValueError(f"export target {name!r} is registered already")
    TARGETS[name] = Target(name, config, write)


def target_of(config: object) -> Target:
    """The target that `config` configures.

    Raises:
        TypeError: no target is registered for this class.
    """
    for target in TARGETS.values():
        if type(config) is target.config:
            return target
    known = ", ".join(target.config.__name__ for target in TARGETS.values())
    raise TypeError(f"{type(config).__name__} configures no export: expected one of {known}")


def require(package: str, why: str) -> Any:
    """Import an optional package of the `export` extra.

    Raises:
        LibOrthoError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise LibOrthoError(
            f"{why} needs the package {package!r}, which is not installed: run "
            "`pip install '.[export]'` in a checkout of LibOrtho"
        ) from None
