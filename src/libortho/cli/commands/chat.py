"""`libortho chat`: ask a split model at one alpha, or at two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from libortho.alpha import alpha_scope, check_alpha, ortho_layers
from libortho.checkpoint import load_split
from libortho.cli.console import console, write_json
from libortho.data.tokens import Template, prompt_ids
from libortho.evaluation.generation import greedy


def run_chat(
    folder: Path,
    *,
    alphas: tuple[float, ...],
    prompt: str | None,
    template: Template,
    max_new_tokens: int,
    json_file: Path | None,
    seed: int,
) -> None:
    """Answer `prompt`, or every line typed, at each alpha; with two, side by side."""
    torch.manual_seed(seed)
    checked = [check_alpha(a) for a in alphas]
    if prompt is not None and not prompt.strip():
        raise ValueError(f"--prompt {prompt!r}: expected something to be answered")
    model = load_split(folder, base_only=all(alpha.is_zero for alpha in checked))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for name, layer in ortho_layers(model).items():
        for alpha in checked:
            layer.require_ortho(alpha, name)
    turns: list[dict[str, Any]] = []
    while True:
        asked = prompt if prompt is not None else _ask()
        if not asked.strip():
            break
        answers = answer_at(model, tokenizer, asked, alphas, template, max_new_tokens)
        _show(answers)
        turns.append({"prompt": asked, "answers": {str(a): text for a, text in answers.items()}})
        if prompt is not None:
            break
    write_json(json_file, {"turns": turns})


def answer_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    alphas: tuple[float, ...],
    template: Template,
    max_new_tokens: int,
) -> dict[float, str]:
    """The greedy answer at each alpha."""
    ids = prompt_ids(prompt, template, tokenizer)
    answers = {}
    for alpha in alphas:
        with alpha_scope(model, alpha):
            (answers[alpha],) = greedy(model, tokenizer, [ids], max_new_tokens)
    return answers


def _ask() -> str:
    try:
        return console.input("[bold]> [/]")
    except (EOFError, KeyboardInterrupt):
        return ""
    except RuntimeError:  # standard input is closed
        return ""


def _show(answers: dict[float, str]) -> None:
    width = max(30, console.width // len(answers) - 1)
    console.print(
        Columns(
            [
                Panel(Text(text), title=f"alpha {alpha:g}", width=width)
                for alpha, text in answers.items()
            ],
            padding=0,
        )
    )
