"""A model whose weights stay on disk: each is read when it is asked for, and let go again.

transformers and accelerate do the work: a model that is loaded with everything on "disk" has its
names, dtypes, ties and conversions settled as they are in memory, and no weights. What is here asks
them for one layer, or for one tensor.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
        self._converted = tempfile.TemporaryDirectory(
            prefix="libortho-", ignore_cleanup_errors=True
        )
        self.model: PreTrainedModel = (
            AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch.bfloat16,
                attn_implementation="eager",
                trust_remote_code=False,
                device_map={"": "disk"},
                offload_folder=self._converted.name,
            )
            .eval()
            .requires_grad_(False)
        )
        self._stored = _stored_weights(self.model)
        self.weights: Mapping[str, Tensor] = _Aliased(self.model, self._stored)

    def __reduce__(self) -> tuple[Callable[[str], ModelOnDisk], tuple[str]]:
        return _opened, (self.name,)

    @contextmanager
    def linear(self, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight (out_features, in_features) and bias of a linear layer, within the block.

        Raises:
            TypeError, ValueError: as `read_linear`.
        """
        from accelerate.utils import align_module_device

        module: nn.Module = self.model.get_submodule(name)
        with align_module_device(module):
            yield read_linear(module, name)

    def files(self) -> list[list[Any]]:
        """[name, bytes, time] of each file that the weights are in, sorted: which model it is.

        Files made by a conversion are left out; what they were made of is in the list.
        """
        paths = {Path(info["safetensors_file"]) for info in self._stored.index.values()}
        found = sorted(p for p in paths if not p.is_relative_to(self._converted.name))
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in found]


@functools.lru_cache(maxsize=1)
def _opened(name: str) -> ModelOnDisk:
    return ModelOnDisk(name)


def _stored_weights(model: nn.Module) -> Any:
    for module in model.modules():
        held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if held is not None:
            return held.dataset
    raise ValueError(f"{type(model).__name__} has no weight on disk: expected all of them there")


class _Aliased(Mapping[str, Tensor]):
    """Tensors by any of the names of the parameter that they are of."""

    def __init__(self, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored
        kept: dict[int, str] = {}
        names = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in names.items():
            if name in stored:
                kept.setdefault(id(parameter), name)
        lost = [name for name, parameter in names.items() if id(parameter) not in kept]
        if lost:
            raise ValueError(f"{lost[0]} is not on disk: expected every weight there")
        self._names = {name: kept[id(parameter)] for name, parameter in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
