"""What does each way of storing the base cost the model, in nats?

    python benchmarks/quantisation.py --text FILE [--json FILE]

The weights of every targeted layer are replaced by what a base stream would hold (no ortho stream,
no split), and the model, in fp32, is compared with itself on a text that it was not calibrated on:
mean KL(original || quantised) over the predicted tokens, and perplexity. Moments come from the
package's general text. The embedded model was itself published in four bits, in groups of 32, so
that plain min/max INT4 loses less on it than on a model that was never quantised.

The bar: error feedback is ahead of nearest rounding with the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from libortho.base import BaseStream, quantize
from libortho.calibration import second_moments
from libortho.cli.console import progress_bars, write_json
from libortho.config import BaseConfig
from libortho.data.embedded import embedded_model_path
from libortho.data.general import general_text
from libortho.data.tokens import Tokens, batches, encode
from libortho.evaluation.text import WINDOW, read_text
from libortho.evaluation.tofu import versions
from libortho.gram import Gram
from libortho.linear import read_linear, select_linear
from libortho.methods.edits import retain_metric
from libortho.methods.geometric import GeometricConfig
from libortho.scoring import predicted_logits

FEEDBACK, NEAREST = "INT4, 64, error feedback", "INT4, 64, clipped, weighted"


def int4(group: int = 64, **changes: Any) -> BaseConfig:
    return BaseConfig(storage="int4", group_size=group, **changes)


# Name -> (config, which second moment it is given).
VARIANTS: dict[str, tuple[BaseConfig, str]] = {
    "INT8": (BaseConfig(), "none"),
    "INT8, error feedback": (BaseConfig(rounding="error_feedback"), "plain"),
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


def quantise_all(
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
        "kl": 0.0,
        "nll": 0.0,
    }


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    bases: dict[str, dict[str, BaseStream]],
    items: list[Tokens],
    rows: dict[str, dict[str, Any]],
    progress: Any,
) -> float:
    """Add each variant's mean KL and NLL to its row; the original's mean NLL."""
    layers = {name: model.get_submodule(name) for name in weights}
    count = sum(item.targets for item in items)
    nll, done, steps = 0.0, 0, len(list(batches(items, WINDOW))) * len(bases)
    for batch in batches(items, WINDOW):
        original = predicted_logits(model, batch)
        nll += float(cross_entropy(original, batch.labels, reduction="sum"))
        original = log_softmax(original, dim=-1)
        for label, streams in bases.items():
            for name, layer in layers.items():
                layer.weight.copy_(streams[name].dequantize())
            logits = predicted_logits(model, batch)
            rows[label]["nll"] += float(cross_entropy(logits, batch.labels, reduction="sum"))
            found = log_softmax(logits, dim=-1)
            rows[label]["kl"] += float(kl_div(found, original, reduction="sum", log_target=True))
            done += 1
            progress("compare", done, steps)
        for name, layer in layers.items():
            layer.weight.copy_(weights[name])
    for row in rows.values():
        row["kl"] /= count
        row["nll"] /= count
        row["perplexity"] = float(torch.tensor(row.pop("nll")).exp())
    return nll / count


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
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    model.eval().requires_grad_(False)
    layers = select_linear(model, options.target)
    weights = {name: read_linear(layer, name)[0].clone() for name, layer in layers.items()}
    known = calibration(tokenizer, options.calibration_tokens)
    items = read_text(options.text, tokenizer, "plain")[: -(-options.tokens // WINDOW)]
    with progress_bars() as progress:
        seen = 0

        def tick(count: int) -> None:
            nonlocal seen
            seen += count
            progress("statistics", seen, len(known))

        plain = {
            n: m.mean().dense() for n, m in second_moments(model, layers, known, tick=tick).items()
        }
        ridge = GeometricConfig().ridge
        moments = {
            "plain": plain,
            "ridge": {
                n: retain_metric(Gram.of(m.clone()), ridge, name=n).moment()
                for n, m in plain.items()
            },
        }
        bases, rows = {}, {}
        for done, (label, (config, kind)) in enumerate(VARIANTS.items()):
            progress("quantise", done, len(VARIANTS))
            bases[label], rows[label] = quantise_all(config, weights, moments, kind)
        nll = compare(model, weights, bases, items, rows, progress)
    table = Table(title=f"{len(layers)} layers, {options.target}", title_justify="left")
    for heading in ("base", "bytes / bf16", "error", "weighted", "KL, nats", "perplexity", "s"):
        table.add_column(heading, justify="left" if heading == "base" else "right")
    perplexity = float(torch.tensor(nll).exp())
    table.add_row("original", "1", "0", "0", "0", f"{perplexity:.3f}", "")
    for label, row in rows.items():
        table.add_row(
            label,
            f"{row['base_bytes_over_bf16']:.4f}",
            f"{row['weight_error']:.4f}",
            f"{row['weighted_error']:.4f}",
            f"{row['kl']:.5f}",
            f"{row['perplexity']:.3f}",
            f"{row['seconds']:.1f}",
        )
    Console().print(table)
    holds = rows[FEEDBACK]["kl"] < rows[NEAREST]["kl"]
    result = {
        "model": "embedded SmolLM2-135M-Instruct" if options.model is None else "given",
        "target": options.target,
        "text": options.text.name,
        "tokens": sum(item.targets for item in items),
        "calibration_tokens": sum(len(item.ids) for item in known),
        "original_perplexity": perplexity,
        "rows": [{"base": label, **row} for label, row in rows.items()],
        "holds": holds,
        **versions(),
    }
    write_json(options.json, result)
    print(f"error feedback ahead of nearest rounding, INT4 in groups of 64: {holds}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
