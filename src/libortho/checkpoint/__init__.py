"""A split model on disk: a folder that transformers reads, with the memory in files of its own.

    config.json            the model's config; its `quantization_config` is the base's manifest
    model.safetensors      every tensor but the ortho streams; or shards with their
                           model.safetensors.index.json
    ortho.safetensors      the ortho streams alone, readable by its owner only (mode 0600)
                           or ortho.safetensors.enc: the same, encrypted
    ortho_config.json      what is in it and which base it belongs to (mode 0600)
    README.md, report.json the model card, and the separation's report
    generation_config.json, tokenizer files      as transformers writes them

Leave the ortho files out and the base runs alone: `strip` makes such a copy, and searches it.
Nothing is ever pickled, and no tensor is used before the folder has been checked. Byte for byte in
docs/checkpoint-format.md.
"""

from libortho.checkpoint.atomic import check_writable
from libortho.checkpoint.encrypt import encrypt_split, rotate_key
from libortho.checkpoint.keys import OrthoKey, ortho_access
from libortho.checkpoint.manifest import (
    LayerEntry,
    Manifest,
    OrthoManifest,
    is_split,
    read_manifest,
    read_ortho_manifest,
)
from libortho.checkpoint.read import load_split
from libortho.checkpoint.search import Searched
from libortho.checkpoint.strip import strip
from libortho.checkpoint.verify import Verified, verify_split
from libortho.checkpoint.write import save_split

__all__ = [
    "LayerEntry",
    "Manifest",
    "OrthoKey",
    "OrthoManifest",
    "Searched",
    "Verified",
    "check_writable",
    "encrypt_split",
    "is_split",
    "load_split",
    "ortho_access",
    "read_manifest",
    "read_ortho_manifest",
    "rotate_key",
    "save_split",
    "strip",
    "verify_split",
]
