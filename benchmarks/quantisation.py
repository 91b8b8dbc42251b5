"""What does each way of storing the base cost the model, in nats and in answers?

    python benchmarks/quantisation.py --text FILE [--json FILE]

The weights of every targeted layer are replaced by a base stream (no ortho stream, no split), and
the model is compared with itself on a text that it was not calibrated on: mean KL(original ||
stored) over the predicted tokens, in fp32 and in bf16, perplexity, and how many of forty answers
to questions of common knowledge are worded otherwise in bf16. In bf16 every sum is rounded, and the
least change rounds it elsewhere: the row "fp32" is the original's own weights, computed in fp32
instead, which no way of storing them can be expected to stay below. Moments come from the package's
general text. The embedded model was itself published in four bits, in groups of 32, so that plain
min/max INT4 loses less on it than on a model that was never quantised.

The bar: error feedback is ahead of nearest rounding with the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from libortho.base import BaseStream, quantize
from libortho.calibration import second_moments
from libortho.cli.console import progress_bars, write_json
from libortho.config import BaseConfig
from libortho.data.embedded import embedded_model_path
from libortho.data.general import general_questions, general_text
from libortho.data.sampling import evenly
from libortho.data.tokens import Tokens, encode, prompt_ids
from libortho.evaluation.generation import greedy
from libortho.evaluation.text import WINDOW, read_text
from libortho.evaluation.tofu import versions
from libortho.gram import Gram
from libortho.linear import install, read_linear, select_linear
from libortho.methods.edits import retain_metric
from libortho.methods.geometric import GeometricConfig
from libortho.scoring import mean_token_kl, perplexity, sequence_nll

QUESTIONS, ANSWER_TOKENS = 40, 48

FEEDBACK, NEAREST = "INT4, 64, error feedback", "INT4, 64, clipped, weighted"


def int4(group: int = 64, **changes: Any) -> BaseConfig:
    return BaseConfig(storage="int4", group_size=group, **changes)


# Name -> (config, which second moment it is given).
VARIANTS: dict[str, tuple[BaseConfig, str]] = {
    "INT8": (BaseConfig(), "none"),
    "INT8, error feedback": (BaseConfig(rounding="error_feedback"), "plain"),
    "INT8, 128": (BaseConfig(group_size=128), "none"),
    "INT4, 64, min/max": (int4(scale="absmax"), "none"),
    "INT4, 64, clipped": (int4(), "none"),
    NEAREST: (int4(rounding="nearest"), "plain"),
    FEEDBACK: (int4(), "plain"),
    # What the geometric method hands over: the moment with its ridge.
    "INT4, 64, error feedback, ridge": (int4(), "ridge"),
    "INT4, 128, clipped, weighted": (int4(128, rounding="nearest"), "plain"),
    "INT4, 128, error feedback": (int4(128), "plain"),
}


def calibration(tokenizer: Any, tokens: int) -> list[Tokens]:
    """About `tokens` tokens of general text, evenly spread over it."""
    items = [encode(text, tokenizer) for text in general_text()]
    return items[:: max(1, round(sum(len(item.ids) for item in items) / tokens))]


def weighted_norm(matrix: Tensor, moment: Tensor) -> float:
    return float(((matrix @ moment) * matrix).sum().clamp_min(0).sqrt())


def stored(
    config: BaseConfig, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], kind: str
) -> tuple[dict[str, BaseStream], dict[str, Any]]:
    """The base of every layer, and the row of the table that needs no forward pass."""
    start = time.perf_counter()
    bases = {
        name: quantize(weight, config, None if kind == "none" else moments[kind][name])
        for name, weight in weights.items()
    }
    seconds = time.perf_counter() - start
    plain, weighted = [], []
    for name, base in bases.items():
        weight, moment = weights[name], moments["plain"][name]
        error = base.dequantize() - weight
        plain.append(float(error.norm() / weight.norm()))
        weighted.append(weighted_norm(error, moment) / weighted_norm(weight, moment))
    numel = sum(weight.numel() for weight in weights.values())
    return bases, {
        "seconds": seconds,
        "base_bytes_over_bf16": sum(base.nbytes for base in bases.values()) / (2 * numel),
        "weight_error": sum(plain) / len(plain),
        "weighted_error": sum(weighted) / len(weighted),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="plain text to compare on")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of it")
    parser.add_argument("--calibration-tokens", type=int, default=8000)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--target", default="down_proj")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.model or str(embedded_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # One set of weights, which bf16 holds; the other dtype is only what is computed in.
    half = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    half.eval().requires_grad_(False)
    single = copy.deepcopy(half).float()
    layers = select_linear(single, options.target)
    weights = {name: read_linear(layer, name)[0] for name, layer in layers.items()}
    known = calibration(tokenizer, options.calibration_tokens)
    items = read_text(options.text, tokenizer, "plain")[: -(-options.tokens // WINDOW)]
    asked = evenly([e.question or "" for e in general_questions()], QUESTIONS)
    prompts = [prompt_ids(question, "plain", tokenizer) for question in asked]
    with progress_bars() as progress:
        seen = 0

        def tick(count: int) -> None:
            nonlocal seen
            seen += count
            progress("statistics", seen, len(known))

        plain = {
            n: m.mean().dense() for n, m in second_moments(single, layers, known, tick=tick).items()
        }
        ridge = GeometricConfig().ridge
        moments = {
            "plain": plain,
            "ridge": {
                n: retain_metric(Gram.of(m.clone()), ridge, name=n).moment()
                for n, m in plain.items()
            },
        }
        said = greedy(half, tokenizer, prompts, ANSWER_TOKENS)

        def beside(other: PreTrainedModel) -> dict[str, Any]:
            """How far a model is from the original in bf16."""
            answers = greedy(other, tokenizer, prompts, ANSWER_TOKENS)
            return {
                "kl_bf16": mean_token_kl(half, other, items),
                "other_answers": sum(a != b for a, b in zip(said, answers, strict=True)),
            }

        original = perplexity(sequence_nll(single, items))
        rows: dict[str, dict[str, Any]] = {"fp32": {"perplexity": original, **beside(single)}}
        for done, (label, (config, kind)) in enumerate(VARIANTS.items()):
            progress(label, done, len(VARIANTS))
            bases, rows[label] = stored(config, weights, moments, kind)
            other = copy.deepcopy(single)
            install(other, bases)
            rows[label]["kl"] = mean_token_kl(single, other, items)
            rows[label]["perplexity"] = perplexity(sequence_nll(other, items))
            other = copy.deepcopy(half)
            install(other, bases)
            rows[label] |= beside(other)
        progress("done", len(VARIANTS), len(VARIANTS))
    table = Table(title=f"{len(layers)} layers, {options.target}", title_justify="left")
    columns = {
        "bytes / bf16": ("base_bytes_over_bf16", ".4f"),
        "error": ("weight_error", ".4f"),
        "weighted": ("weighted_error", ".4f"),
        "KL, fp32": ("kl", ".5f"),
        "KL, bf16": ("kl_bf16", ".5f"),
        f"other answers of {len(prompts)}": ("other_answers", "d"),
        "perplexity": ("perplexity", ".3f"),
        "s": ("seconds", ".1f"),
    }
    table.add_column("base")
    for heading in columns:
        table.add_column(heading, justify="right")
    for label, row in rows.items():
        cells = (f"{row[key]:{form}}" if key in row else "" for key, form in columns.values())
        table.add_row(label, *cells)
    Console().print(table)
    holds = rows[FEEDBACK]["kl"] < rows[NEAREST]["kl"]
    result = {
        "model": "embedded SmolLM2-135M-Instruct" if options.model is None else "given",
        "target": options.target,
        "text": options.text.name,
        "tokens": sum(item.targets for item in items),
        "calibration_tokens": sum(len(item.ids) for item in known),
        "questions": len(prompts),
        "rows": [{"base": label, **row} for label, row in rows.items()],
        "holds": holds,
        **versions(),
    }
    write_json(options.json, result)
    print(f"error feedback ahead of nearest rounding, INT4 in groups of 64: {holds}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
