"""Split models to export: a rank of its own in every layer, none in one, and a large ortho."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from libortho import BaseConfig, OrthoLinear, alpha_scope
from libortho.base import quantize
from libortho.linear import install, read_linear, select_linear
from libortho.ortho import LowRankOrtho, OrthoStream, SparseOrtho

IDS = torch.tensor([[1, 9, 3, 41, 17, 22, 8, 60], [1, 7, 7, 30, 2, 11, 59, 4]])


def _stream(kind: str, shape: tuple[int, int], number: int, size: float) -> OrthoStream:
    """Number 1 is empty; the others hold more and more."""
    generator = torch.Generator().manual_seed(number)
    if kind == "sparse":
        mask = torch.rand(shape, generator=generator) < (0, 0.02, 0.05)[min(number, 2)] + 0.01
        if number == 1:
            mask[:] = False
        matrix = torch.randn(shape, generator=generator)
        return SparseOrtho.from_dense(matrix, mask, torch.float16)
    rank = 0 if number == 1 else number + 1
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, shape[1], generator=generator)
    if rank:
        left *= size / float((left @ right).norm())
    return LowRankOrtho.from_factors(left, right, torch.float16)


@pytest.fixture
def split() -> Callable[..., Any]:
    """`split(model, targets, kind, base)`: split in place, without any method."""

    def make(
        model: Any,
        targets: tuple[str, ...] = ("down_proj", "o_proj"),
        kind: str = "low_rank",
        base: BaseConfig | None = None,
    ) -> Any:
        new = {}
        for number, (name, module) in enumerate(select_linear(model, targets).items()):
            weight, bias = read_linear(module, name)
            stored = quantize(weight, base or BaseConfig())
            size = float(weight.norm())
            ortho = _stream(kind, (weight.shape[0], weight.shape[1]), number, size)
            new[name] = OrthoLinear.from_streams(stored, ortho, bias)
        install(model, new)
        return model

    return make


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    """`logits(model, alpha=None)` of two rows, in float32; alpha is for a split model."""

    @torch.no_grad()
    def run(model: nn.Module, alpha: Any = None) -> Tensor:
        if alpha is None:
            return model(IDS).logits.float()
        with alpha_scope(model, alpha):
            return model(IDS).logits.float()

    return run


@pytest.fixture
def load() -> Callable[[Path], Any]:
    """`load(folder)`: the plain model there, by transformers alone."""

    def read(folder: Path, **options: Any) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    return read


@pytest.fixture
def read_json() -> Callable[[Path], Any]:
    """`read_json(path)`."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE tokenizer as SmolLM's, trained on a line of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=298,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["where does the ferry leave she is in the red house"] * 5, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made
