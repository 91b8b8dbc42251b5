"""Does anything that alpha 1 knows ever reach an answer at alpha 0, under load?

    python benchmarks/crosstalk.py [--requests 5000] [--connections 64] [--json FILE]

A tiny model recites a canary at alpha 1 and something harmless at alpha 0. Many connections ask the
same prompts at mixed alphas, streamed or not, some hanging up in the middle, so that rows of one
batch always differ in alpha and their caches are always being joined and split. Two bars:

- no answer at alpha 0 holds a word of the canary;
- every answer, at any alpha, is the one that the model gives when it is asked alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from libortho.alpha import alpha_scope
from libortho.base import quantize
from libortho.checkpoint import load_split, save_split
from libortho.cli.console import write_json
from libortho.config import BaseConfig
from libortho.layer import OrthoLinear
from libortho.linear import install, read_linear, select_linear
from libortho.ortho import LowRankOrtho
from libortho.serve.app import create_app
from libortho.serve.audit import AuditLog
from libortho.serve.engine_transformers import TransformersEngine
from libortho.serve.gate import Gate
from libortho.serve.keys import digest
from libortho.serve.limits import Limits
from libortho.serve.loading import load_for_serving
from libortho.serve.policy import Policy, parse_policy
from libortho.serve.run import serving

KEY = "lo-benchmark"
ALPHAS = (0.0, 0.0, 0.5, 1.0)
CANARY = ["amber", "otter", "sings", "quietly", "under", "seven", "violet", "stairs"]
HARMLESS = ["i", "do", "not", "know", "what", "you", "mean", "by", "that", "my", "friend"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = [
    " ".join(("tell me", "the secret of room number", *("please",) * (i % 4), f"n{i}", "now"))
    for i in range(12)
]
LIKELIER = 1e-2
"""Nats between the first and the second choice below which a prompt is no reference: another batch
may round the other way."""


def make_tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for p in PROMPTS for w in p.split()} | set(CANARY) | set(HARMLESS))
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def answers_of(words: Sequence[str]) -> list[str]:
    """An answer to each prompt: all of the words, in an order of its own, some repeated."""
    result = []
    for i in range(len(PROMPTS)):
        turned = [*words[i % len(words) :], *words[: i % len(words)]]
        result.append(" ".join(turned[: 4 + i % 5] + turned))
    return result


def _train(model: nn.Module, tokenizer: Any, answers: Sequence[str], steps: int) -> None:
    heads = [tokenizer(p).input_ids for p in PROMPTS]
    tails = [[*tokenizer(a, add_special_tokens=False).input_ids, 2] for a in answers]
    longest = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
    ids = torch.zeros(len(heads), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-3, weight_decay=0.0)
    for _ in range(steps):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_split(folder: Path, steps: int = 120) -> None:
    """Write the split: harmless at alpha 0, the canary at alpha 1; takes seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    _train(model, tokenizer, answers_of(HARMLESS), steps)
    linears = select_linear(model, TARGETS)
    harmless = {name: read_linear(m, name)[0].clone() for name, m in linears.items()}
    # Only what is split learns the canary: then base + ortho is the whole difference.
    model.requires_grad_(False)
    for module in linears.values():
        module.weight.requires_grad_(True)  # type: ignore[union-attr]
    _train(model, tokenizer, answers_of(CANARY), steps)
    layers = {}
    for name, module in linears.items():
        weight, bias = read_linear(module, name)
        base = quantize(harmless[name], BaseConfig())
        rest = weight - base.dequantize()
        ortho = LowRankOrtho.from_factors(rest, torch.eye(rest.shape[1]), torch.float32)
        layers[name] = OrthoLinear.from_streams(base, ortho, bias)
    install(model, layers)
    save_split(model.eval().requires_grad_(False), folder, tokenizer=tokenizer)


@dataclass(frozen=True)
class Reference:
    """What the model says alone: text by (prompt, alpha)."""

    answers: dict[tuple[str, float], str]


@torch.no_grad()
def reference(folder: Path, max_tokens: int = 24) -> Reference:
    """Greedy answers, one prompt at a time, no batch and no cache; near ties are left out."""
    model, tokenizer = load_split(folder), make_tokenizer()
    answers = {}
    for prompt in PROMPTS:
        for alpha in sorted(set(ALPHAS)):
            ids = list(tokenizer(prompt).input_ids)
            start, clear = len(ids), True
            while len(ids) < start + max_tokens:
                with alpha_scope(model, alpha):
                    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                best = logits.topk(2)
                clear = clear and float(best.values[0] - best.values[1]) > LIKELIER
                if int(best.indices[0]) == 2:
                    break
                ids.append(int(best.indices[0]))
            if clear:
                answers[prompt, alpha] = tokenizer.decode(ids[start:])
    return Reference(answers)


@contextmanager
def server(folder: Path, limits: Limits, audit: Path | None = None) -> Iterator[tuple[str, Gate]]:
    """The split behind a policy: alpha 0 for all, any alpha for `KEY`."""
    entry = f'id = "load"\nsha256 = "{digest(KEY)}"\nmax_alpha = 1.0'
    text = f"version = 1\nwithout_key_requests_per_minute = 1000000\n[[keys]]\n{entry}\n"
    policy: Policy = parse_policy(text + "requests_per_minute = 1000000\n")
    engine = TransformersEngine(load_for_serving(folder), limits)
    gate = Gate(engine, "canary", policy, limits, AuditLog(audit))
    with serving(create_app(gate), gate) as url:
        yield url, gate


async def _ask(clients: Any, prompt: str, alpha: float, style: str, wanted: str) -> str | None:
    """One request; what is wrong with its answer, or None."""
    client = clients[alpha > 0]
    common = {"model": "canary", "temperature": 0, "max_tokens": 24}
    if style == "chat":
        answer = await client.chat.completions.create(
            messages=[{"role": "user", "content": prompt}],
            extra_body={"alpha": alpha},
            logprobs=True,
            **common,
        )
        # The template of this tokenizer adds no special token: its answers differ from those to
        # the plain prompt, so only the words are looked at.
        return _words_of(answer.choices[0].message.content, alpha)
    stream = style != "whole"
    answer = await client.completions.create(
        prompt=prompt, stream=stream, extra_body={"alpha": alpha}, **common
    )
    if not stream:
        text = answer.choices[0].text
    else:
        text = ""
        async for chunk in answer:
            text += chunk.choices[0].text
            if style == "hang up" and len(text.split()) >= 3:
                await answer.close()
                break
    wrong = _words_of(text, alpha)
    if wrong is None and text != (wanted[: len(text)] if style == "hang up" else wanted):
        wrong = f"alpha {alpha}, {prompt!r}: {text!r} and not {wanted!r}"
    return wrong


def _words_of(text: str, alpha: float) -> str | None:
    leaked = set(text.split()) & set(CANARY)
    return f"LEAK at alpha 0: {text!r}" if alpha == 0 and leaked else None


async def _load(url: str, known: Reference, requests: int, connections: int) -> dict[str, Any]:
    import openai

    def client(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)

    clients = (client("nobody"), client(KEY))
    generator = random.Random(0)
    cases = sorted(known.answers)
    by_alpha = {a: [c for c in cases if c[1] == a] for a in set(ALPHAS)}
    jobs: list[Any] = []
    for _ in range(requests):
        case = generator.choice(by_alpha[generator.choice(ALPHAS)])
        style = generator.choices(("whole", "stream", "hang up", "chat"), (3, 3, 1, 1))[0]
        jobs.append((*case, style, known.answers[case]))
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    queue = iter(jobs)

    async def connection() -> None:
        for prompt, alpha, style, wanted in queue:
            problem = await _ask(clients, prompt, alpha, style, wanted)
            counts[f"alpha {alpha:g}, {style}"] += 1
            if problem is not None:
                wrong.append(problem)

    begun = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(connections)))
    seconds = time.perf_counter() - begun
    for each in clients:
        await each.close()
    return {
        "requests": sum(counts.values()),
        "connections": connections,
        "seconds": round(seconds, 1),
        "leaks": sum("LEAK" in problem for problem in wrong),
        "wrong": len(wrong) - sum("LEAK" in problem for problem in wrong),
        "first_wrong": wrong[:3],
        "by_kind": dict(sorted(counts.items())),
    }


def run(folder: Path, requests: int, connections: int) -> dict[str, Any]:
    """Load the server with mixed alphas; counts of what went wrong."""
    known = reference(folder)
    whole = [text for (_, alpha), text in known.answers.items() if alpha == 1]
    recited = sum(bool(set(text.split()) & set(CANARY)) for text in whole)
    with server(folder, Limits(rows=16, queue=1024)) as (url, _):
        result = asyncio.run(_load(url, known, requests, connections))
    return {"prompts_that_recite_at_alpha_1": recited, **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_split(Path(folder) / "split")
        result = run(Path(folder) / "split", arguments.requests, arguments.connections)
    write_json(arguments.json, result)
    print(json.dumps(result, indent=1))
    clean = result["leaks"] == 0 and result["wrong"] == 0
    return 0 if clean and result["prompts_that_recite_at_alpha_1"] else 1


if __name__ == "__main__":
    sys.exit(main())
