"""How many tokens a second does a whole model generate, split and beside its peers?

    python benchmarks/generation.py [--quick] [--json FILE] [--bars FILE] [--model NAME]

Two models: the embedded SmolLM2-135M, and TinyLlama-1.1B's shape with random weights. Every peer
generates the same number of tokens after the same prompt, one request, greedily, in turn with all
others. The split model has INT8 bases and a rank-4 ortho stream in every linear layer of its
blocks; peers that quantise do so in the same layers. Peers come from requirements-bench.txt; one
that is not installed is named and counts as a bar that was not measured, which does not hold.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import BARS, Bar, Rounds, at_least, keep
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from libortho import OrthoLinear, set_alpha
from libortho.base import quantize
from libortho.cli.console import write_json
from libortho.data.embedded import embedded_model_path
from libortho.evaluation.tofu import versions
from libortho.kernels import native
from libortho.linear import install, select_linear
from libortho.ortho import LowRankOrtho

TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
RANK, PROMPT = 4, 32
ZERO, ONE = "split, INT8, alpha 0", "split, INT8, alpha 1"


def smollm2() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        str(embedded_model_path()), dtype=torch.bfloat16, trust_remote_code=False
    )


def tinyllama() -> PreTrainedModel:
    """TinyLlama-1.1B's sizes; random weights, since time does not depend on their values."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


MODELS = {"SmolLM2-135M": smollm2, "TinyLlama-1.1B shape": tinyllama}


def split(model: PreTrainedModel) -> PreTrainedModel:
    """The model with INT8 bases and small random rank-4 ortho streams."""
    replacements = {}
    for name, layer in select_linear(model, TARGETS).items():
        left = torch.randn(layer.out_features, RANK) / 1000
        ortho = LowRankOrtho(left.half(), (torch.randn(RANK, layer.in_features) / 1000).half())
        base = quantize(layer.weight.detach())
        replacements[name] = OrthoLinear.from_streams(base, ortho, layer.bias)
    install(model, replacements)
    return model


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(model, config)


def with_torchao(model: PreTrainedModel) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=_in_blocks)
    return model


def with_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    import bitsandbytes

    # It says with every product that it computes in fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, layer in select_linear(model, TARGETS).items():
        new = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
        )
        weight = layer.weight.detach().half()
        new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu"))
    return model


def _in_blocks(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same weights: seven copies of 1.1B would not fit."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def in_fp32(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).float()  # in place, so on weights of its own


# Name -> (package or None, what is done with modules that share the bf16 model's weights).
PEERS: dict[str, tuple[str | None, Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "transformers, fp32": (None, in_fp32),
    "transformers, bf16": (None, lambda model: model),
    "PEFT LoRA, bf16": ("peft", with_lora),
    "torchao, INT8 weights": ("torchao", with_torchao),
    "bitsandbytes, 8 bit": ("bitsandbytes", with_bitsandbytes),
}


def generator(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Callable[[int], object]:
    def run(number: int) -> object:
        return model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return run


def split_at(
    model: PreTrainedModel, alpha: float, prompt: Tensor, tokens: int
) -> Callable[[int], object]:
    run = generator(model, prompt, tokens)

    def at_alpha(number: int) -> object:
        set_alpha(model, alpha)
        return run(number)

    return at_alpha


def measure(name: str, tokens: int, rounds: int) -> tuple[dict[str, float], list[Bar]]:
    """Tokens a second by peer, and the bars."""
    original = MODELS[name]().eval().requires_grad_(False)
    prompt = torch.randint(10, original.config.vocab_size, (1, PROMPT))
    ours = split(sharing(original))
    variants = {
        ZERO: split_at(ours, 0.0, prompt, tokens),
        ONE: split_at(ours, 1.0, prompt, tokens),
    }
    bars = []
    for peer, (package, change) in PEERS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"{peer}: not measured, {package} is not installed (requirements-bench.txt)")
            bars.append(Bar(f"{name}, alpha 1 over {peer} (not measured): at least", 0, 1, False))
            continue
        start = time.perf_counter()
        model = change(sharing(original)).eval()
        variants[peer] = generator(model, prompt, tokens)
        print(f"{name}: made {peer} in {time.perf_counter() - start:.1f} s", flush=True)
    # One call is long enough for a round.
    found = Rounds(variants, rounds, 0.0)
    for peer in PEERS:
        if peer in variants:
            for ours_at in (ZERO, ONE):
                alpha = ours_at.rsplit(", ", 1)[1]
                bars.append(
                    at_least(f"{name}, {alpha} over {peer}", found.ratio(peer, ours_at), 1.0)
                )
    return {peer: tokens / found.median(peer) for peer in variants}, bars


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--model", choices=list(MODELS), help="one of the two")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bars", type=Path, default=BARS)
    options = parser.parse_args()
    torch.manual_seed(0)
    names = [options.model] if options.model else list(MODELS)
    rates, bars = {}, []
    with torch.inference_mode():
        for name in names:
            # The quick form gives the larger model, whose tokens take three times as long, fewer.
            quick_tokens = 16 if name == "SmolLM2-135M" else 6
            tokens, rounds = (quick_tokens, 3) if options.quick else (64, 7)
            rates[name], more = measure(name, tokens, rounds)
            bars += more
    table = Table(title="tokens a second, one request", title_justify="left")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for peer in dict.fromkeys(peer for found in rates.values() for peer in found):
        cells = (rates[name].get(peer) for name in names)
        table.add_row(peer, *("" if rate is None else f"{rate:.2f}" for rate in cells))
    Console(width=110).print(table)
    kernels = "C++ operators" if native.available() else "PyTorch's (C++ operators not built)"
    print(f"kernels: {kernels}; {torch.get_num_threads()} threads")
    holds = keep("generation", bars, options.bars)
    write_json(options.json, {"tokens_per_second": rates, "kernels": kernels, **versions()})
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
