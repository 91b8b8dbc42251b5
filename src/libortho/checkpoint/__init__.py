"""A split model on disk: two plain safetensors files and the JSON that binds them.

    config.json, generation_config.json, tokenizer files    as transformers writes them
    base.safetensors       every tensor of the model but the ortho streams
    ortho.safetensors      the ortho streams alone, readable by its owner only (mode 0600)
    libortho.json          what is where, and the digests (see `Manifest`)
    report.json            the separation's report, when one was given

Leave `ortho.safetensors` out and the memory is not there: `base_only` makes such a copy. Nothing
is ever pickled, and nothing is loaded before all of it has been checked.
"""

from libortho.checkpoint.atomic import check_writable
from libortho.checkpoint.manifest import (
    LayerEntry,
    Manifest,
    TensorEntry,
    is_split,
    read_manifest,
)
from libortho.checkpoint.read import load_split
from libortho.checkpoint.verify import verify_split
from libortho.checkpoint.write import base_only, save_split

__all__ = [
    "LayerEntry",
    "Manifest",
    "TensorEntry",
    "base_only",
    "check_writable",
    "is_split",
    "load_split",
    "read_manifest",
    "save_split",
    "verify_split",
]
