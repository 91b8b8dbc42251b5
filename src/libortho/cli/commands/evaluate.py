"""`libortho eval`: perplexity and probability per token of a text, at each alpha."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from libortho.checkpoint import load_split, read_manifest
from libortho.cli.console import console, progress_bars, write_json
from libortho.data.tokens import Template
from libortho.devices import check_device_here
from libortho.evaluation.show import print_evaluation
from libortho.evaluation.text import evaluate_text, parse_alphas, read_text


def run_evaluate(
    folder: Path,
    text: Path,
    *,
    alpha: str,
    template: Template,
    json_file: Path | None,
    seed: int,
    device_map: str | None,
) -> None:
    """Measure a split on a text at each of the comma-separated alphas."""
    torch.manual_seed(seed)
    alphas = parse_alphas(alpha)
    if device_map is not None:
        check_device_here(device_map)
    read_manifest(folder)  # else the hub would be asked for a tokenizer of that name
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    items = read_text(text, tokenizer, template)
    model = load_split(folder, base_only=not any(alphas), device_map=device_map)
    with progress_bars() as progress:
        measured = evaluate_text(model, items, alphas, progress)
    result = {"checkpoint": str(folder), "text": str(text), **measured}
    write_json(json_file, result)
    print_evaluation(result, console)
