"""What a split checkpoint says of itself. The dataclasses below *are* the schema.

The base's part stands in `config.json`, as its `quantization_config`, which is where transformers
looks; the ortho stream's stands in `ortho_config.json`, beside its tensors. Neither repeats the
other, but for the base's digest, which is what binds the two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from libortho.checkpoint.names import (
    CONFIG,
    ORTHO_CONFIG,
    ORTHO_SEALED,
    OUTDATED,
    PathLike,
    base_files,
    ortho_file,
)
from libortho.checkpoint.schema import blame, decode, read_object
from libortho.config import Storage
from libortho.errors import CheckpointError

QUANT_METHOD: Literal["libortho"] = "libortho"
FORMAT_VERSION: Literal[1] = 1
SECTION = "quantization_config"

OrthoKind = Literal["sparse", "low_rank"]
FloatName = Literal["float16", "bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class LayerEntry:
    """The base of one split layer.

    Attributes:
        shape: (out_features, in_features).
        base: storage of the base stream; `checkpoint.streams` lists the tensors of each.
    """

    shape: tuple[int, int]
    base: Storage


@dataclass(frozen=True)
class Manifest:
    """All of `quantization_config` in `config.json`.

    Attributes:
        quant_method: how transformers tells whose format this is.
        format_version: a reader knows one version.
        libortho_version: of the writer, for people.
        base_sha256: hex digest of every tensor of the base (`tensorfile.digest`), which names it.
        streams_sha256: hex digest of the base streams of the split layers alone, those that an
            ortho stream adds to: few enough bytes to be read whenever the model is loaded.
        layers: module name -> split layer.
        tied: parameter name -> name of the stored parameter that stands in this place too.
        buffer_dtypes: floating buffers that are not stored but computed from the config (rotary
            frequencies), name -> dtype that they had, where that is not what a model has that is
            built from the config.
        config_sha256: hex digest of the rest of `config.json` (`config_digest`), since one changed
            number in it is another model; None, and not in the file, where an older version wrote.
    """

    quant_method: Literal["libortho"]
    format_version: Literal[1]
    libortho_version: str
    base_sha256: str
    streams_sha256: str
    layers: dict[str, LayerEntry]
    tied: dict[str, str]
    buffer_dtypes: dict[str, FloatName]
    config_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = dataclasses.asdict(self)
        if self.config_sha256 is None:
            del plain["config_sha256"]
        return plain


@dataclass(frozen=True)
class Encryption:
    """That `ortho.safetensors.enc` stands in the place of `ortho.safetensors`.

    Attributes:
        cipher: how (`checkpoint.sealed`).
        key_id: `OrthoKey.id` of the key that opens it.
    """

    cipher: Literal["AES-256-GCM"]
    key_id: str


@dataclass(frozen=True)
class OrthoManifest:
    """All of `ortho_config.json`.

    Attributes:
        quant_method, format_version, libortho_version: as in `Manifest`.
        base_sha256: of the base that it was made with, and the only one that it fits.
        ortho_sha256: hex digest of every tensor of `ortho.safetensors`, taken like the base's.
        layers: module name -> form of its ortho stream. A split layer may have none.
        encryption: None, and not in the file, where the tensors are plain.
    """

    quant_method: Literal["libortho"]
    format_version: Literal[1]
    libortho_version: str
    base_sha256: str
    ortho_sha256: str
    layers: dict[str, OrthoKind]
    encryption: Encryption | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = dataclasses.asdict(self)
        if self.encryption is None:
            del plain["encryption"]
        return plain


def is_split(folder: PathLike) -> bool:
    """True where the `config.json` in `folder` names LibOrtho as its `quant_method`."""
    try:
        section = read_object(Path(folder) / CONFIG).get(SECTION)
    except (OSError, ValueError):
        return False
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def read_manifest(folder: PathLike) -> Manifest:
    """The checked manifest of a checkpoint; reads no tensors (see `verify_split` for those).

    Raises:
        CheckpointError: not a folder, a file is missing, or the manifest is malformed, of another
            version, or contradicts itself.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: expected the folder of a split checkpoint")
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a whole split checkpoint")
    if (folder / OUTDATED).is_file():
        raise CheckpointError(
            f"{folder / OUTDATED}: a format from before the first release, which is read no more; "
            "make the split again"
        )
    with blame(path):
        plain = read_object(path).get(SECTION)
    if not is_split(folder):
        raise CheckpointError(
            f"{folder} is a model, and no split of one: expected a folder that `libortho separate` "
            f"wrote ({CONFIG} does not name {QUANT_METHOD!r} as its quant_method)"
        )
    base_files(folder)
    with blame(path):
        return parse_manifest(plain)


def parse_manifest(plain: Any) -> Manifest:
    """The checked manifest from a config's `quantization_config`; ValueError if it is none."""
    _check_version(plain, SECTION)
    manifest: Manifest = decode(Manifest, plain, SECTION)
    if not manifest.layers:
        raise ValueError("layers is empty: a split checkpoint has at least one")
    for name, layer in manifest.layers.items():
        if min(layer.shape) < 1:
            raise ValueError(f"layers.{name}.shape={layer.shape}: expected two numbers above 0")
    for key in ("base_sha256", "streams_sha256", "config_sha256"):
        if plain.get(key) is not None:
            _check_digest(key, plain[key])
    for name in (*manifest.layers, *manifest.tied, *manifest.tied.values()):
        if is_ortho_name(name):
            raise ValueError(f"{name} is an ortho tensor: the base must not hold any")
    return manifest


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a `config.json` less its manifest: as compact JSON, keys sorted, ASCII only."""
    rest = {key: config[key] for key in config if key != SECTION}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_config(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError where the rest of `config.json` is not as it was saved."""
    path = folder / CONFIG
    if manifest.config_sha256 is None:
        return
    with blame(path):
        found = config_digest(read_object(path))
        if found != manifest.config_sha256:
            raise ValueError(
                f"the sha256 of the model's config is {found[:12]}..., config_sha256 says "
                f"{manifest.config_sha256[:12]}...: it was changed after it was saved"
            )


def read_ortho_manifest(folder: Path, manifest: Manifest) -> OrthoManifest | None:
    """The checked `ortho_config.json` of a checkpoint, or None where it has no ortho stream.

    Raises:
        CheckpointError: it is there without the tensors or the other way round, malformed, of
            another version, of another base than `manifest`'s, or it says that the tensors are
            encrypted where they are plain, or the reverse.
    """
    path, tensors = folder / ORTHO_CONFIG, ortho_file(folder)
    if tensors is None:
        return None
    with blame(path):
        plain = read_object(path)
        _check_version(plain, "the file")
        ortho: OrthoManifest = decode(OrthoManifest, plain)
        for key in ("base_sha256", "ortho_sha256"):
            _check_digest(key, getattr(ortho, key))
        if ortho.base_sha256 != manifest.base_sha256:
            raise ValueError(
                f"made for the base with sha256 {ortho.base_sha256[:12]}..., this one is "
                f"{manifest.base_sha256[:12]}...: the two are not of one split"
            )
        if (ortho.encryption is not None) != (tensors.name == ORTHO_SEALED):
            says = "plain" if ortho.encryption is None else "encrypted"
            raise ValueError(f"says that the tensors are {says}, and {tensors.name} is there")
        if not ortho.layers:
            raise ValueError("layers is empty: an ortho stream is of at least one layer")
        for name in ortho.layers:
            if name not in manifest.layers:
                raise ValueError(f"layers.{name}: no such layer is split")
    return ortho


def is_ortho_name(name: str) -> bool:
    """True for tensors of an ortho stream, `<module>.ortho.<tensor>`."""
    return "ortho" in name.split(".")


def _check_version(plain: Any, where: str) -> None:
    # Before anything else: a newer format may differ in any other key.
    if not isinstance(plain, dict) or plain.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{where}: expected an object with quant_method={QUANT_METHOD!r}")
    version = plain.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"format_version={version!r}: this version of libortho reads {FORMAT_VERSION}"
        )


def _check_digest(key: str, digest: str) -> None:
    if len(digest) != 64 or set(digest) - set(string.hexdigits.lower()):
        raise ValueError(f"{key}={digest!r}: expected 64 hexadecimal digits, lower case")
