"""The finished layers of a split that is being made, one file each: what a killed run goes on from.

A file appears under its name when its layer is finished, whole and on the disk, so that the folder
is its own journal. It holds the ortho stream beside the base, and is open to its owner alone. Where
ortho streams are written encrypted, this one is too, in a file of its own that was there before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save, save_file
from torch import Tensor

from libortho.checkpoint.atomic import sync
from libortho.checkpoint.keys import OrthoKey
from libortho.checkpoint.manifest import LayerEntry, is_ortho_name
from libortho.checkpoint.schema import blame, decode, read_object
from libortho.checkpoint.sealed import seal, unseal
from libortho.checkpoint.skeleton import empty_layer
from libortho.checkpoint.streams import base_names, ortho_names, storage_of
from libortho.checkpoint.tensorfile import (
    TensorEntry,
    digest,
    opened,
    read_entries,
    read_tensor,
)
from libortho.files import remove, replacing, write_json
from libortho.layer import OrthoLinear
from libortho.report import LayerReport, Split

JOURNAL = "journal.json"


@dataclass(frozen=True)
class LayerPart:
    """One split layer as it is stored.

    Attributes:
        layer: form of its base.
        tensors: the tensors of both streams, and the bias if there is one, by their names in the
            checkpoint.
        report: of the layer.
    """

    layer: LayerEntry
    tensors: dict[str, Tensor] = field(repr=False)
    report: LayerReport

    @classmethod
    def of(cls, split: Split, bias: Tensor | None, report: LayerReport) -> LayerPart:
        """A part from a split, with copies of nothing."""
        name = report.name
        layer = LayerEntry(split.base.shape, storage_of(split.base, name))
        named = {n: getattr(split.base, part) for part, n in base_names(name, layer).items()}
        for part, full in ortho_names(name, split.ortho.kind).items():
            named[full] = getattr(split.ortho, part)
        if bias is not None:
            named[f"{name}.bias"] = bias
        tensors = {n: t.detach().cpu().contiguous() for n, t in named.items()}
        return cls(layer, tensors, report)


class Parts(Mapping[str, Tensor]):
    """A folder of finished layers; a mapping from names to tensors, each read when asked for.

    Args:
        folder: new, or of an earlier run that was to do the same.
        made_of: JSON-ready; whatever decides what the parts will be.
        key: the ortho streams are encrypted with it; None leaves them plain.

    Attributes:
        folder: as given.
        reports: module name -> report, of the layers that are finished.

    Raises:
        ValueError: the folder is of a run with another `made_of` or key.
        CheckpointError: a file in it is damaged.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any], key: OrthoKey | None = None) -> None:
        self.folder = folder
        self._key = key
        if key is not None:
            made_of = {**made_of, "key": key.id}
        self.reports: dict[str, LayerReport] = {}
        self._layers: dict[str, LayerEntry] = {}
        self._entries: dict[str, TensorEntry] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = folder / JOURNAL
        if journal.is_file():
            with blame(journal):
                found = read_object(journal)
            if found != json.loads(json.dumps(made_of)):
                raise ValueError(
                    f"{folder} is of an unfinished split of another model, or with other settings: "
                    "finish that one, or remove the folder"
                )
        else:
            # What is there without it is of a run that was killed while it removed the folder.
            for path in folder.glob("*.*"):
                remove(path)
            write_json(journal, made_of)
        for path in sorted(folder.glob("*.safetensors")):
            self._read(path)

    def add(self, part: LayerPart) -> None:
        """Keep a finished layer; it is on the disk when this returns."""
        path = self.folder / f"{len(self.reports):06d}.safetensors"
        metadata = {
            "base": part.layer.base,
            "report": json.dumps(dataclasses.asdict(part.report)),
        }
        apart = {n for n in part.tensors if self._key is not None and is_ortho_name(n)}
        with replacing(path) as partial:
            plain = {n: tensor for n, tensor in part.tensors.items() if n not in apart}
            save_file(plain, str(partial), metadata=metadata)
            partial.chmod(0o600)
            sync(partial)
            if self._key is not None:
                content = save({n: part.tensors[n] for n in apart})
                with replacing(_sealed(path)) as sealed:
                    sealed.write_bytes(seal(content, self._key, digest(read_entries(partial))))
                    sync(sealed)
        sync(self.folder)
        self._read(path)

    def _read(self, path: Path) -> None:
        with blame(path), opened(path) as file:
            metadata = file.metadata() or {}
            report: LayerReport = decode(LayerReport, json.loads(metadata["report"]), "report")
            plain = {"shape": list(report.shape), "base": metadata["base"]}
            self._layers[report.name] = decode(LayerEntry, plain, "base")
        self.reports[report.name] = report
        entries = read_entries(path)
        self._entries |= entries
        if self._key is not None:
            sealed = _sealed(path)
            self._entries |= read_entries(sealed, unseal(sealed, self._key, digest(entries)))

    def layers(self, names: Iterable[str]) -> dict[str, OrthoLinear]:
        """Split layers without data (meta device), in the order of `names`."""
        made = {}
        for name in names:
            report = self.reports[name]
            kind: Any = report.kind
            made[name] = empty_layer(name, self._layers[name], kind, self._entries)
            made[name].report = report
        return made

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _sealed(path: Path) -> Path:
    return path.with_suffix(".ortho.enc")
