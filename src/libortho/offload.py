"""A model whose weights stay on disk: each is read when it is asked for, and let go again.

transformers and accelerate do the work: a model that is loaded with everything on "disk" has its
names, dtypes, ties and conversions settled as they are in memory, and no weights. What is here asks
them for one layer, or for one tensor.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from libortho.checkpoint.tensorfile import read_entries, read_tensor
from libortho.files import scratch
from libortho.linear import read_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelOnDisk:
    """A causal LM on disk. Pickled by its name: another process opens it anew, and once.

    Args:
        name: a local folder or a Hugging Face name. A model's own code is never run.

    Attributes:
        name: as given.
        model: without weights (meta device), in evaluation mode, bf16 as `load_model` has it.
        weights: name -> tensor, read from disk each time that it is asked for. Every parameter is
            there under each of its names.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: a weight was not left on disk.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM

        self.name = name
        # Weights whose stored form is not the model's own (experts, one file each) are converted
        # once, into this folder.
        stack = ExitStack()
        place = scratch(Path(tempfile.gettempdir()), "libortho-offload-", folder=True)
        self._converted = stack.enter_context(place)
        weakref.finalize(self, stack.close)
        self.model: PreTrainedModel = (
            AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch.bfloat16,
                attn_implementation="eager",
                trust_remote_code=False,
                device_map={"": "disk"},
                offload_folder=str(self._converted),
            )
            .eval()
            .requires_grad_(False)
        )
        self._index = _index_of(self.model)
        self.weights: Mapping[str, Tensor] = _Weights(self.model, self._index)

    def __reduce__(self) -> tuple[Callable[[str], ModelOnDisk], tuple[str]]:
        return _opened, (self.name,)

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight (out_features, in_features) and bias of a linear layer, read from disk.

        Raises:
            TypeError, ValueError: as `read_linear`.
        """
        module = copy.copy(self.model.get_submodule(name))
        module._parameters = {
            part: None if parameter is None else self._read(f"{name}.{part}")
            for part, parameter in module._parameters.items()
        }
        return read_linear(module, name)

    def _read(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.weights[name], requires_grad=False)

    def files(self) -> list[list[Any]]:
        """[name, bytes, time] of each file that the weights are in, sorted: which model it is.

        Files made by a conversion are left out; what they were made of is in the list.
        """
        paths = {Path(info["safetensors_file"]) for info in self._index.values()}
        found = sorted(p for p in paths if not p.is_relative_to(self._converted))
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in found]


@functools.lru_cache(maxsize=1)
def _opened(name: str) -> ModelOnDisk:
    return ModelOnDisk(name)


def _index_of(model: nn.Module) -> dict[str, dict[str, str]]:
    """Parameter name -> its "safetensors_file", "weight_name" in it and "dtype" in the model."""
    for module in model.modules():
        held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if held is not None:
            index: dict[str, dict[str, str]] = held.dataset.index
            return index
    raise ValueError(f"{type(model).__name__} has no weight on disk: expected all of them there")


class _Weights(Mapping[str, Tensor]):
    """Parameters under all of their names, each read when it is asked for."""

    def __init__(self, model: nn.Module, index: Mapping[str, Mapping[str, str]]) -> None:
        files = {info["safetensors_file"] for info in index.values()}
        entries = {file: read_entries(Path(file)) for file in files}
        stored = {
            name: (
                entries[info["safetensors_file"]][info.get("weight_name", name)],
                getattr(torch, info["dtype"]),
            )
            for name, info in index.items()
        }
        names = dict(model.named_parameters(remove_duplicate=False))
        kept = {id(parameter): stored[name] for name, parameter in names.items() if name in stored}
        for name, parameter in names.items():
            if id(parameter) not in kept:
                raise ValueError(f"{name} is not on disk: expected every weight there")
        self._stored = {name: kept[id(parameter)] for name, parameter in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        entry, dtype = self._stored[name]
        return read_tensor(entry).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
