"""A split model as an ordinary Hugging Face model: the ground that every export stands on."""

from __future__ import annotations

import copy
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from libortho.alpha import ortho_layers
from libortho.checkpoint.names import CONFIG
from libortho.config import FactorDtype, check_choice
from libortho.layer import OrthoLinear
from libortho.linear import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Weight = Callable[[str, OrthoLinear], Tensor]
"""(name, layer) -> the weight (out_features, in_features) to stand for it: exact, or codes."""


def check_dtype(dtype: FactorDtype | None) -> None:
    """Raise ValueError unless `dtype` is None or the name of a floating dtype."""
    if dtype is not None:
        check_choice("dtype", dtype, FactorDtype)


def weight_dtype(model: PreTrainedModel, dtype: FactorDtype | None) -> torch.dtype:
    """The dtype that an export's weights get: `dtype`, or that of the model's other weights."""
    if dtype is not None:
        named: torch.dtype = getattr(torch, dtype)
        return named
    return model.dtype


def plain_model(
    model: PreTrainedModel, weight: Weight, dtype: FactorDtype | None = None
) -> tuple[PreTrainedModel, float]:
    """A copy of a split model in which ordinary linear layers stand where split ones stood.

    Tensors that need no change are shared with `model`, which stays as it is.

    Args:
        model: a split causal LM.
        weight: what goes into each split layer; rounded to the copy's dtype if it is floating.
        dtype: of every parameter; None keeps what the model has, and gives the split layers the
            dtype of the others.

    Returns:
        The copy, and what rounding the split layers' weights to the dtype cost: the largest
        `storing_error`.

    Raises:
        ValueError: a value is beyond the range of the dtype.
    """
    target = weight_dtype(model, dtype)
    convolutions = conv1d_names(model)
    # deepcopy takes what the memo holds for a copy that is made already: so tensors are shared, and
    # a split layer becomes a plain one under every name that it has.
    memo: dict[int, Any] = {}
    error = 0.0
    for name, layer in ortho_layers(model).items():
        exact = weight(name, layer)
        stored = _cast(exact, target, name)
        error = max(error, storing_error(exact, stored))
        memo[id(layer)] = _linear(layer, name, stored, target, name in convolutions)
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(
            _cast(parameter.detach(), parameter.dtype if dtype is None else target, name),
            requires_grad=False,
        )
    for buffer in model.buffers():
        memo.setdefault(id(buffer), buffer)
    plain = copy.deepcopy(model, memo)
    plain.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    plain.config.dtype = target
    head = plain.get_output_embeddings()
    if head is not None and head.weight is not plain.get_input_embeddings().weight:
        plain.config.tie_word_embeddings = False
    return plain, error


def conv1d_names(model: PreTrainedModel) -> frozenset[str]:
    """The split layers that are transformers' Conv1D in the model that the config describes."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return frozenset(n for n in ortho_layers(model) if is_conv1d(whole.get_submodule(n)))


def _linear(
    layer: OrthoLinear, name: str, weight: Tensor, dtype: torch.dtype, convolution: bool
) -> nn.Module:
    bias = layer.bias
    made: Any
    if convolution:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            made = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        made = nn.Linear(
            layer.in_features, layer.out_features, bias=bias is not None, device="meta"
        )
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(_cast(bias, dtype, f"{name}.bias"), requires_grad=False)
    return made


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"{name} reaches {float(tensor.abs().max()):.6g}, beyond {dtype}: expected a dtype "
            "with more range, such as bfloat16"
        )
    return result


def save_plain(
    plain: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    private: bool,
) -> None:
    """Write an ordinary model and, if given, its tokenizer; `folder` may be there or not.

    Args:
        plain: the model.
        folder: where.
        tokenizer: written beside it.
        private: the weights hold the memory: their files are their owner's alone. Else they are as
            open as the other files, by the umask.
    """
    with _any_generation_config(plain, folder):
        plain.save_pretrained(str(folder))
    # safetensors creates its files closed to others, whatever is in them.
    mode = 0o600 if private else stat.S_IMODE((folder / CONFIG).stat().st_mode)
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


@contextmanager
def _any_generation_config(plain: PreTrainedModel, folder: Path) -> Iterator[None]:
    # save_pretrained refuses settings that many published models have, such as a temperature
    # without sampling: the file is written by hand then.
    from transformers import GenerationConfig

    kept = plain.generation_config
    plain.generation_config = GenerationConfig()
    yield
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if kept is not None:
        kept.to_json_file(str(path), use_diff=True)


def storing_error(exact: Tensor, stored: Tensor) -> float:
    """||stored - exact||_F / ||exact||_F of one weight; 0 where both are zero."""
    exact = exact.float()
    size = float(exact.norm())
    error = float((stored.float() - exact).norm())
    return error / size if size else error
