"""Fine-tuned models, each made once: cached under a digest of model, data and recipe.

A long fine-tune keeps its state beside the cache and, killed, goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from libortho.data.tokens import Tokens
from libortho.files import cache_dir, scratch, sweep, unfinished
from libortho.training import MemoriseConfig, Progress, memorise_

CACHE_FORMAT = 1
"""Raised when `memorise_` changes what it makes of the same inputs."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.enc", "config.json")
_SPEECH = ("generation_config.json", "*token*", "*.jinja", "vocab*", "merges.txt", "*.model")
"""A folder's files that say what a model computes, and how text and tokens are made of each other,
and where an answer ends."""


def load_model(name: str, device_map: str | dict[str, str] | None = None) -> PreTrainedModel:
    """A causal LM in bf16, in evaluation mode, without gradients. Never runs a model's own code.

    Args:
        name: a local folder or a Hugging Face name.
        device_map: where its layers go, as of `from_pretrained` (needs accelerate); the CPU by
            default.
    """
    # Eager attention: on a CPU, in bf16, it is about twice as fast as the fused kernel for short
    # sequences, forward and backward (torch 2.13).
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        trust_remote_code=False,
        device_map=device_map,
    )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model in the cache.

    Attributes:
        folder: where it lies; `load_model(str(folder))` loads it.
        epochs: of its fine-tune.
        seconds: of its fine-tune, as far as it was not interrupted; None where it is not known.
        cached: it was there already.
    """

    folder: Path
    epochs: int
    seconds: float | None
    cached: bool

    def load(self) -> PreTrainedModel:
        """The model."""
        return load_model(str(self.folder))


def fine_tuned(
    model: str, items: Sequence[Tokens], recipe: MemoriseConfig, label: str, tell: Progress
) -> FineTuned:
    """`model` fine-tuned on `items`, from the cache if it is there.

    Args:
        model: a local folder or a Hugging Face name of a causal LM.
        items: what to memorise.
        recipe: how.
        label: what to call it while it is made.
        tell: called as work goes on.
    """
    digest = digest_of(model, items, recipe)
    folder = cache_dir() / "memorised" / digest
    marker = folder / "memorised.json"
    state = folder.parent / f"{digest}.state"
    if marker.is_file():
        _remove_state(state)  # a process that was killed may have left it
        held = json.loads(marker.read_text())
        return FineTuned(folder, int(held["epochs"]), held.get("seconds"), True)
    start = time.perf_counter()
    resumed = state.is_file()
    loaded = load_model(model)
    epochs = memorise_(
        loaded,
        items,
        recipe,
        lambda stage, done, total: tell(f"{label}: {stage}", done, total),
        state,
    )
    seconds = None if resumed else time.perf_counter() - start
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch(folder.parent, unfinished(folder), folder=True) as partial:
        loaded.save_pretrained(partial)
        (partial / marker.name).write_text(json.dumps({"epochs": epochs, "seconds": seconds}))
        try:
            os.replace(partial, folder)
        except OSError:
            if not marker.is_file():  # another process was first: its model is as good
                raise
    _remove_state(state)
    return FineTuned(folder, epochs, seconds, False)


def _remove_state(state: Path) -> None:
    state.unlink(missing_ok=True)
    sweep(state.parent, unfinished(state))


def digest_of(model: str, items: Sequence[Tokens], recipe: MemoriseConfig) -> str:
    """What identifies a fine-tune: 20 hexadecimal digits."""
    described = {
        "format": CACHE_FORMAT,
        "model": _identity(model, _WEIGHTS),  # the tokenizer's part is in the items
        "items": [(item.ids, item.prompt) for item in items],
        "recipe": dataclasses.asdict(recipe),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]


def model_identity(model: str) -> list[Any]:
    """What tells a model from another under the same name: its weights and how it speaks.

    Of a hub name the commit, of a folder the names, sizes and times of its files.

    Raises:
        OSError: a hub name that is neither reachable nor cached.
    """
    return _identity(model, (*_WEIGHTS, *_SPEECH))


def _identity(model: str, patterns: Sequence[str]) -> list[Any]:
    folder = Path(model)
    if not folder.is_dir():
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return [model, getattr(config, "_commit_hash", None)]
    files = dict.fromkeys(f for pattern in patterns for f in sorted(folder.glob(pattern)))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
