"""The main job: memorise some authors, split the model, and measure who still knows them.

    full model      fine-tuned on all authors
    reference       fine-tuned, by the same recipe, without the authors to be forgotten
    split           the full model, separated; measured at several alphas

Both fine-tunes are cached under a digest of model, data and recipe, so that a second run only
splits and measures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import libortho
from libortho.alpha import alpha_scope
from libortho.data.embedded import cache_dir
from libortho.data.examples import Example
from libortho.data.tasks import Task
from libortho.data.tokens import Template, Tokens, encode, prompt_ids
from libortho.evaluation.generation import greedy
from libortho.evaluation.metrics import forget_quality, truth_ratio
from libortho.report import SeparationReport
from libortho.scoring import answer_probability, perplexity, sequence_nll
from libortho.separate import SeparationConfig, separate_
from libortho.training import MemoriseConfig, memorise_

Progress = Callable[[str, int, int], None]

CACHE_FORMAT = 1
"""Raised when `memorise_` changes what it makes of the same inputs."""


@dataclass(frozen=True)
class TofuJob:
    """One run of the main job.

    Attributes:
        model: a local folder or a Hugging Face name of a causal LM.
        task: what is memorised and forgotten.
        recipe: of both fine-tunes.
        separation: of the split.
        alphas: at which the split is measured.
        template: how a question becomes a prompt.
        reference: also fine-tune and measure the model that never saw the forget authors.
        examples: forget questions whose answers are shown in the report.
    """

    model: str
    task: Task
    recipe: MemoriseConfig = field(default_factory=MemoriseConfig)
    separation: SeparationConfig = field(default_factory=SeparationConfig)
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    template: Template = "plain"
    reference: bool = True
    examples: int = 6


@dataclass(frozen=True)
class TofuOutcome:
    """What a job made.

    Attributes:
        summary: JSON-ready measurements; the report is drawn from it alone.
        model: the split model.
        tokenizer: its tokenizer.
        report: of the split.
    """

    summary: dict[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: SeparationReport


def load_model(name: str) -> PreTrainedModel:
    """A causal LM in bf16, in evaluation mode, without gradients. Never runs a model's own code."""
    # Eager attention: on a CPU, in bf16, it is about twice as fast as the fused kernel for short
    # sequences, forward and backward (torch 2.13).
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=False
    )
    return model.eval().requires_grad_(False)


def run_tofu(job: TofuJob, progress: Progress | None = None) -> TofuOutcome:
    """Run the job; see the module's text.

    Raises:
        ValueError, OSError: as `separate_` and the loading of models do.
    """
    tell = progress or (lambda stage, done, total: None)
    started, seconds = time.perf_counter(), dict[str, float]()
    tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    forget = [encode(e, tokenizer, job.template) for e in job.task.forget]
    retain = [encode(e, tokenizer, job.template) for e in job.task.retain]
    unseen = [encode(e, tokenizer, job.template) for e in job.task.unseen]
    measure = _Measure(job, tokenizer, forget, retain)

    clock = time.perf_counter()
    model, epochs, cached = _memorised(job, "full", [*retain, *forget], job.recipe, tell)
    seconds["full model"] = time.perf_counter() - clock
    tell("measure the full model", 0, 1)
    rows: dict[str, dict[str, Any]] = {"full": measure(model)}
    answers: dict[str, list[str]] = {"full": measure.answers(model)}

    if job.reference:
        clock = time.perf_counter()
        # The same recipe means the same number of epochs, not the same level: what the reference
        # does not know it cannot reach.
        recipe = dataclasses.replace(job.recipe, target=1.0, max_epochs=epochs)
        reference, _, _ = _memorised(job, "reference", retain, recipe, tell)
        seconds["reference"] = time.perf_counter() - clock
        tell("measure the reference", 0, 1)
        rows["reference"] = measure(reference)
        answers["reference"] = measure.answers(reference)
        del reference

    clock = time.perf_counter()
    report = separate_(
        model,
        forget,
        retain,
        job.separation,
        tokenizer=tokenizer,
        before=load_model(job.model),
        unseen=unseen or None,
        progress=tell,
    )
    seconds["split"] = time.perf_counter() - clock
    clock = time.perf_counter()
    for done, alpha in enumerate(job.alphas):
        tell("measure the split", done, len(job.alphas))
        with alpha_scope(model, alpha):
            rows[f"alpha {alpha:g}"] = measure(model)
            if alpha in (min(job.alphas), max(job.alphas)):
                answers[f"alpha {alpha:g}"] = measure.answers(model)
    tell("measure the split", len(job.alphas), len(job.alphas))
    seconds["measure"] = time.perf_counter() - clock
    if "reference" in rows:
        for row in rows.values():
            row["forget_quality"] = forget_quality(
                row["truth_ratios"], rows["reference"]["truth_ratios"]
            )
    seconds["total"] = time.perf_counter() - started
    summary = {
        "task": {
            "name": job.task.name,
            "source": job.task.source,
            "forget": len(forget),
            "retain": len(retain),
        },
        "model": job.model,
        "rows": rows,
        "checks": _checks(rows, report),
        "examples": _examples(job.task.forget[: job.examples], answers),
        "separation": report.to_dict(),
        "recipe": {**dataclasses.asdict(job.recipe), "epochs": epochs, "cached": cached},
        "seconds": seconds,
        "versions": versions(),
    }
    return TofuOutcome(summary, model, tokenizer, report)


def versions() -> dict[str, str]:
    """What a result was measured with."""
    return {
        "libortho": libortho.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _checks(rows: dict[str, dict[str, Any]], report: SeparationReport) -> list[dict[str, Any]]:
    """The job's bars, each with its value: what a split of this kind should achieve."""
    base, whole, full = rows.get("alpha 0"), rows.get("alpha 1"), rows["full"]
    # A model that never knew them has nothing to forget, and every bar below would be idle.
    known = ("full model: forget probability", full["forget_probability"], ">=", 0.9)
    found: list[tuple[str, float, str, float]] = [known]
    if base and "reference" in rows:
        gap = abs(base["forget_probability"] - rows["reference"]["forget_probability"])
        found.append(("alpha 0: forget probability, distance to the reference", gap, "<=", 0.05))
    if base:
        kept = base["retain_probability"] / full["retain_probability"]
        found.append(("alpha 0: retain probability / full model's", kept, ">=", 0.95))
    if whole:
        for part in ("forget", "retain"):
            gap = abs(whole[f"{part}_probability"] - full[f"{part}_probability"])
            found.append(
                (f"alpha 1: {part} probability, distance to the full model", gap, "<=", 0.01)
            )
    if report.layers and report.layers[0].kind == "low_rank":
        found.append(("ortho parameters / targeted layers'", report.density, "<=", 0.01))
    return [
        {
            "bar": name,
            "value": value,
            "required": f"{sign} {limit}",
            "holds": value <= limit if sign == "<=" else value >= limit,
        }
        for name, value, sign, limit in found
    ]


def _examples(shown: Sequence[Example], answers: dict[str, list[str]]) -> list[dict[str, str]]:
    return [
        {
            "question": example.question or "",
            "truth": example.answer,
            **{who: said[i] for who, said in answers.items()},
        }
        for i, example in enumerate(shown)
    ]


def truth_ratios(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "plain",
) -> list[float]:
    """`truth_ratio` of each example, the paraphrased answer being the right one.

    Raises:
        ValueError: an example has no paraphrased or no perturbed answers.
    """
    for example in examples:
        if not example.perturbed_answers or example.paraphrased_answer is None:
            raise ValueError(
                f"{example.question!r} has no paraphrased and perturbed answers: "
                "the truth ratio is not defined"
            )
    answers = [(e.question, e.paraphrased_answer or "", e.perturbed_answers) for e in examples]
    tokens = [
        encode(Example(a, question), tokenizer, template)
        for question, right, wrong in answers
        for a in (right, *wrong)
    ]
    losses = iter([float(nll.mean()) for nll in sequence_nll(model, tokens)])
    return [truth_ratio(next(losses), [next(losses) for _ in wrong]) for _, _, wrong in answers]


class _Measure:
    """The measurements of one model, the same for every row of the table."""

    def __init__(
        self,
        job: TofuJob,
        tokenizer: PreTrainedTokenizerBase,
        forget: list[Tokens],
        retain: list[Tokens],
    ) -> None:
        self._job, self._tokenizer = job, tokenizer
        self._forget, self._retain = forget, retain

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        known, kept = sequence_nll(model, self._forget), sequence_nll(model, self._retain)
        ratios = truth_ratios(model, self._job.task.forget, self._tokenizer, self._job.template)
        return {
            "forget_probability": answer_probability(known),
            "retain_probability": answer_probability(kept),
            "forget_perplexity": perplexity(known),
            "retain_perplexity": perplexity(kept),
            "truth_ratio": sum(ratios) / len(ratios),
            "truth_ratios": ratios,
        }

    def answers(self, model: PreTrainedModel) -> list[str]:
        """Greedy answers to the first forget questions."""
        prompts = [
            prompt_ids(e.question or "", self._job.template, self._tokenizer)
            for e in self._job.task.forget[: self._job.examples]
        ]
        return greedy(model, self._tokenizer, prompts, 40) if prompts else []


# -- the cache of fine-tuned models --------------------------------------------------------------


def _digest(model: str, items: Sequence[Tokens], recipe: MemoriseConfig) -> str:
    described = {
        "format": CACHE_FORMAT,
        "model": _model_identity(model),
        "items": [(item.ids, item.prompt) for item in items],
        "recipe": dataclasses.asdict(recipe),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]


def _model_identity(model: str) -> list[Any]:
    folder = Path(model)
    if not folder.is_dir():
        return [model]
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _memorised(
    job: TofuJob, label: str, items: list[Tokens], recipe: MemoriseConfig, tell: Progress
) -> tuple[PreTrainedModel, int, bool]:
    """The model fine-tuned on `items`: (model, epochs, came from the cache)."""
    folder = cache_dir() / "memorised" / _digest(job.model, items, recipe)
    marker = folder / "memorised.json"
    if marker.is_file():
        tell(f"load the {label} model", 1, 1)
        return load_model(str(folder)), int(json.loads(marker.read_text())["epochs"]), True
    model = load_model(job.model)
    epochs = memorise_(
        model, items, recipe, lambda stage, done, total: tell(f"{label}: {stage}", done, total)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        (partial / marker.name).write_text(json.dumps({"epochs": epochs}))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model, epochs, False
