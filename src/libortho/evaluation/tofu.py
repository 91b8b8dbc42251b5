"""The TOFU job: fine-tune, split or unlearn by every method asked for, and measure all alike.

    full         fine-tuned on all authors
    reference    fine-tuned, by the same recipe, without the authors to be forgotten
    a split      the full model, separated; measured at several alphas
    a baseline   the full model, unlearned by gradient steps to the same level; measured once

Fine-tunes are cached. Splits and measurements are files in the job's folder, and a job that is
started again with that folder goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

import libortho
from libortho.alpha import alpha_scope
from libortho.baselines.registry import Baseline
from libortho.baselines.tune import TuneConfig, tune
from libortho.checkpoint import load_split, save_split
from libortho.data.embedded import cache_dir
from libortho.data.tasks import Task
from libortho.data.tokens import Template, Tokens, encode, evenly, prompt_ids
from libortho.evaluation.bars import Bar, benchmark_bars, demo_bars
from libortho.evaluation.finetuned import FineTuned, fine_tuned, load_model
from libortho.evaluation.folder import JobFolder, read_evaluation, write_evaluation
from libortho.evaluation.generation import greedy
from libortho.evaluation.rows import median_row, row_of
from libortho.evaluation.suite import (
    Evaluation,
    SuiteConfig,
    SuiteData,
    evaluate_suite,
    with_reference,
)
from libortho.goal import REHEARSAL, REHEARSED, Aiming
from libortho.memory import PeakMemory
from libortho.scoring import mean_token_kl
from libortho.separate import SeparationConfig, separate_
from libortho.training import MemoriseConfig, Progress

MEASURED_FORMAT = 1
"""Raised when the suite measures the same model otherwise."""

QUICK_TOKENS = 32
"""Longest answer that the quick suite shows."""

KL_SEQUENCES = 40
"""Sequences of each set over which the distance to the full model is averaged."""


@dataclass(frozen=True)
class TofuJob:
    """One run of the job.

    Attributes:
        model: a local folder or a Hugging Face name of a causal LM.
        task: what is memorised and forgotten.
        methods: name -> how to split, or which baseline to run; the first is the main method, whose
            rows are called "alpha 0" and so on, and which the bars are about.
        recipe: of the fine-tunes.
        suite: what is measured of each model.
        alphas: where splits are measured.
        template: how questions become prompts.
        reference: also fine-tune the reference.
        seeds: the whole is done once for each: order of the training data, randomness of methods.
        tuning: budget of each baseline.
        wikitext: running text for perplexity, or None.
        examples: questions whose answers are shown.
    """

    model: str
    task: Task
    methods: Mapping[str, SeparationConfig | Baseline] = field(
        default_factory=lambda: {"geometric": SeparationConfig()}
    )
    recipe: MemoriseConfig = field(default_factory=MemoriseConfig)
    suite: SuiteConfig = field(default_factory=lambda: SuiteConfig(quick=True))
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    template: Template = "plain"
    reference: bool = True
    seeds: tuple[int, ...] = (0,)
    tuning: TuneConfig = field(default_factory=TuneConfig)
    wikitext: str | None = None
    examples: int = 6

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty: expected at least one")
        if not isinstance(next(iter(self.methods.values())), SeparationConfig):
            raise ValueError(
                f"the first method is {next(iter(self.methods))}: expected one that splits, "
                "for the table to have an alpha; baselines come after it"
            )
        if not self.seeds:
            raise ValueError("seeds is empty: expected at least one")

    @property
    def main(self) -> str:
        """The main method."""
        return next(iter(self.methods))

    @property
    def baselines(self) -> list[str]:
        return [n for n, m in self.methods.items() if not isinstance(m, SeparationConfig)]


def run_tofu(job: TofuJob, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the job; see the module's text.

    Args:
        job: what to do.
        folder: for splits and measurements; empty, or that of an interrupted run of the same job.
        progress: called as work goes on.

    Returns:
        The summary, JSON-ready; the report is drawn from it alone.

    Raises:
        FileExistsError: `folder` holds something else.
        ValueError, OSError: as `separate_` and the loading of models do.
    """
    tell = progress or (lambda stage, done, total: None)
    started = time.perf_counter()
    store = JobFolder(folder, _identity(job))
    tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    seeds = {}
    for seed in job.seeds:
        label = "" if len(job.seeds) == 1 else f"seed {seed}: "

        def labelled(stage: str, done: int, total: int, label: str = label) -> None:
            tell(label + stage, done, total)

        seeds[seed] = _Seed(job, seed, store, tokenizer, labelled).run()
    first = seeds[job.seeds[0]]
    names = [name for name in first.rows if all(name in s.rows for s in seeds.values())]
    rows = {name: median_row([s.rows[name] for s in seeds.values()]) for name in names}
    return {
        "task": {
            "name": job.task.name,
            "source": job.task.source,
            "forget": len(job.task.forget),
            "retain": len(job.task.retain),
        },
        "model": job.model,
        "methods": {
            name: dataclasses.asdict(method) | {"kind": type(method).__name__}
            for name, method in job.methods.items()
        },
        "rows": rows,
        "bars": [bar.to_dict() for bar in _bars(job, rows, first.separation)],
        "seeds": {
            str(seed): {
                "rows": done.rows,
                "bars": [bar.to_dict() for bar in _bars(job, done.rows, done.separation)],
                "missing": {row: e.missing for row, e in done.evaluations.items()},
                "tuning": done.tuning,
                "reached": done.separation["reached"],
            }
            for seed, done in seeds.items()
        },
        "examples": first.examples,
        "separation": first.separation,
        "recipe": {**dataclasses.asdict(job.recipe), **first.recipe},
        "suite": dataclasses.asdict(job.suite),
        "seconds": {**first.seconds, "total": time.perf_counter() - started},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What a result was measured with."""
    return {
        "libortho": libortho.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _identity(job: TofuJob) -> dict[str, Any]:
    """What must be equal for a job to go on in a folder: all that its results depend on."""
    return {
        "libortho": libortho.__version__,
        "model": job.model,
        "task": dataclasses.asdict(job.task),
        "methods": {
            name: [type(method).__name__, dataclasses.asdict(method)]
            for name, method in job.methods.items()
        },
        "recipe": dataclasses.asdict(job.recipe),
        "suite": dataclasses.asdict(job.suite),
        "alphas": job.alphas,
        "template": job.template,
        "reference": job.reference,
        "seeds": job.seeds,
        "tuning": dataclasses.asdict(job.tuning),
        "wikitext": job.wikitext,
        "examples": job.examples,
    }


def _bars(
    job: TofuJob, rows: Mapping[str, Mapping[str, Any]], separation: Mapping[str, Any]
) -> list[Bar]:
    low_rank = separation["layers"] and separation["layers"][0]["kind"] == "low_rank"
    density = separation["totals"]["density"] if low_rank else None
    if job.suite.quick or "reference" not in rows or not {"alpha 0", "alpha 1"} <= set(rows):
        return demo_bars(rows, density)
    return benchmark_bars(rows, density, job.baselines)


class _Seed:
    """The job for one seed; its results are in its attributes after `run`."""

    def __init__(
        self, job: TofuJob, seed: int, store: JobFolder, tokenizer: Any, tell: Progress
    ) -> None:
        self.job, self.seed, self.store = job, seed, store
        self.tokenizer, self.tell = tokenizer, tell
        self.forget = self._encode(job.task.forget)
        self.retain = self._encode(job.task.retain)
        self.unseen = self._encode(job.task.unseen)
        self.data = SuiteData.of_task(job.task, job.wikitext)
        self.evaluations: dict[str, Evaluation] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.tuning: dict[str, Any] = {}
        self.recipe: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.separation: dict[str, Any] = {}
        self.examples: list[dict[str, str]] = []

    def _encode(self, examples: Any) -> list[Tokens]:
        return [encode(e, self.tokenizer, self.job.template) for e in examples]

    def run(self) -> _Seed:
        job = self.job
        full = self._fine_tune("full", [*self.retain, *self.forget])
        self._measure_fine_tuned("full", full)
        if job.reference:
            reference = self._fine_tune("reference", self.retain, epochs=full.epochs)
            self._measure_fine_tuned("reference", reference)
        for name, method in job.methods.items():
            if isinstance(method, SeparationConfig):
                self._split(name, method, full)
            else:
                self._unlearn(name, method, full)
        self._finish()
        return self

    # -- models --------------------------------------------------------------------------------

    def _fine_tune(self, label: str, items: list[Tokens], epochs: int | None = None) -> FineTuned:
        recipe = dataclasses.replace(self.job.recipe, seed=self.seed)
        if epochs is not None:
            # The same recipe means the same number of epochs, not the same level: what the
            # reference does not know it cannot reach.
            recipe = dataclasses.replace(recipe, target=1.0, max_epochs=epochs)
        clock = time.perf_counter()
        made = fine_tuned(self.job.model, items, recipe, label, self.tell)
        self.seconds[f"{label} model"] = time.perf_counter() - clock
        self.recipe.setdefault("epochs", made.epochs)
        self.recipe[f"{label} cached"] = made.cached
        return made

    def _split(self, name: str, config: SeparationConfig, full: FineTuned) -> None:
        """Split the full model (or find the split that an interrupted run made), and measure."""
        folder = self.store.split(self.seed, name, main=self._is_first(name))

        @functools.cache
        def model() -> PreTrainedModel:
            return self._load_or_make_split(name, config, full, folder)

        for alpha in self.job.alphas:
            with_alpha = functools.partial(self._at, model, alpha)
            row = f"alpha {alpha:g}" if name == self.job.main else f"{name}, alpha {alpha:g}"
            ends = alpha in (0.0, 1.0)
            compared = full if ends and not self.job.suite.quick else None
            self._measure(row, model, with_alpha, compared, shown=ends)
        held = self.store.read(self.seed, f"{name}.json")
        if name == self.job.main:
            self.separation = held["report"]
            self.seconds["split"] = held["seconds"]
        for row, values in self.rows.items():
            if row.startswith("alpha " if name == self.job.main else f"{name}, alpha "):
                values |= {key: held[key] for key in ("seconds", "peak_memory")}

    def _is_first(self, name: str) -> bool:
        return name == self.job.main and self.seed == self.job.seeds[0]

    @staticmethod
    def _at(model: Callable[[], PreTrainedModel], alpha: float) -> Any:
        return alpha_scope(model(), alpha)

    def _load_or_make_split(
        self, name: str, config: SeparationConfig, full: FineTuned, folder: Path
    ) -> PreTrainedModel:
        if self.store.has(self.seed, f"{name}.json"):
            return _eager(load_split(folder))
        model = full.load()
        before, rehearsing = None, 0.0
        if isinstance(config.method, Aiming):
            before = load_model(self.job.model)
            if config.earlier == "rehearse":  # what `separate_` would do by itself, but cached
                items = evenly(self.retain, REHEARSED)
                made = fine_tuned(self.job.model, items, REHEARSAL, "rehearsal", self.tell)
                before, rehearsing = made.load(), made.seconds or 0.0
                config = dataclasses.replace(config, earlier="trust")
        clock = time.perf_counter()
        with PeakMemory() as memory:
            report = separate_(
                model,
                self.forget,
                self.retain,
                _seeded(config, self.seed),
                tokenizer=self.tokenizer,
                before=before,
                unseen=self.unseen or None,
                progress=self._named(name),
            )
        save_split(model, folder, tokenizer=self.tokenizer, report=report)
        found = report.to_dict()
        spent = time.perf_counter() - clock - found["seconds"].get("measure", 0.0)
        spent += rehearsing
        self.store.write(
            self.seed,
            f"{name}.json",
            {"seconds": spent, "peak_memory": memory.growth, "report": found},
        )
        return model

    def _named(self, name: str) -> Progress:
        if len(self.job.methods) == 1:
            return self.tell
        return lambda stage, done, total: self.tell(f"{name}: {stage}", done, total)

    def _unlearn(self, name: str, baseline: Baseline, full: FineTuned) -> None:
        """Tune a baseline to the level that the main method aimed at, and measure the best."""
        level = float(self.separation["target"]["probability"])
        found: dict[str, Any] = {}

        def make() -> PreTrainedModel:
            outcome = tune(
                full.load,
                self.forget,
                self.retain,
                _seeded(baseline, self.seed),
                level,
                self.job.tuning,
                self._named(name),
            )
            chosen = outcome.candidates[outcome.chosen]
            found.update(
                seconds=chosen.training_seconds,
                peak_memory=chosen.peak_memory,
                stopped=chosen.reached,
                candidates=[dataclasses.asdict(c) for c in outcome.candidates],
                chosen=outcome.chosen,
            )
            self.store.write(self.seed, f"{name}.json", found)
            return outcome.model

        self._measure(name, make, shown=True)
        held = self.store.read(self.seed, f"{name}.json")
        self.tuning[name] = held
        self.rows[name] |= {key: held[key] for key in ("seconds", "peak_memory", "stopped")}

    # -- measurements ----------------------------------------------------------------------------

    def _measure_fine_tuned(self, row: str, made: FineTuned) -> None:
        """`_measure`, or what another job measured of this very model in the same way."""
        job = self.job
        described = [
            MEASURED_FORMAT,
            libortho.__version__,
            made.folder.name,
            job.model,
            dataclasses.asdict(self.data),
            dataclasses.asdict(job.suite),
            job.template,
            job.examples,
        ]
        text = json.dumps(described, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:20]
        cache = cache_dir() / "measured" / digest
        if self.store.evaluation(self.seed, row) is None:
            held = read_evaluation(cache)
            if held is not None:
                self.store.keep(self.seed, row, held)
        self._measure(row, made.load, shown=True)
        write_evaluation(self.evaluations[row], cache)

    def _measure(
        self,
        row: str,
        make: Callable[[], PreTrainedModel],
        scope: Callable[[], Any] | None = None,
        full: FineTuned | None = None,
        *,
        shown: bool = False,
    ) -> None:
        """Evaluate a model, unless an interrupted run did.

        Args:
            row: its name.
            make: makes or loads it.
            scope: entered while it is measured.
            full: the model that its distance is measured to, or None.
            shown: its answers are shown.
        """
        held = self.store.evaluation(self.seed, row)
        if held is None:
            model = make()
            clock = time.perf_counter()
            with scope() if scope else nullcontext():
                evaluation = evaluate_suite(
                    model,
                    self.tokenizer,
                    self.data,
                    self.job.suite,
                    template=self.job.template,
                    pretrained=self._pretrained,
                    progress=lambda stage, done, total: self.tell(f"{row}: {stage}", done, total),
                )
                if self.job.suite.quick and shown:
                    evaluation.logs["forget_answers"] = self._answers(model)
                if full is not None:
                    evaluation.logs["kl_to_full"] = self._distance(model, full.load())
            self.seconds["measure"] = self.seconds.get("measure", 0.0) + time.perf_counter() - clock
            self.store.keep(self.seed, row, evaluation)
            held = evaluation
        self.evaluations[row] = held
        self.rows[row] = row_of(held.logs)

    @functools.cached_property
    def _pretrained(self) -> PreTrainedModel | None:
        return None if self.job.suite.quick else load_model(self.job.model)

    def _distance(self, model: PreTrainedModel, full: PreTrainedModel) -> dict[str, Any]:
        items = [*self.forget[:KL_SEQUENCES], *self.retain[:KL_SEQUENCES]]
        return {"agg_value": mean_token_kl(full, model, items)}

    def _answers(self, model: PreTrainedModel) -> dict[str, Any]:
        """Greedy answers to the first forget questions, in the shape of a metric's entry."""
        prompts = [
            prompt_ids(e.question or "", self.job.template, self.tokenizer)
            for e in self.job.task.forget[: self.job.examples]
        ]
        said = greedy(model, self.tokenizer, prompts, QUICK_TOKENS)
        by_index = {str(i): {"generation": text} for i, text in enumerate(said)}
        return {"agg_value": None, "value_by_index": by_index}

    def _finish(self) -> None:
        """Compare every model with the reference, and collect the answers that are shown."""
        reference = self.evaluations.get("reference")
        for row, evaluation in self.evaluations.items():
            if reference is not None:
                compared = with_reference(evaluation, reference.logs)
                self.store.keep(self.seed, row, compared)
                self.evaluations[row] = evaluation = compared
            self.rows[row] = {**self.rows[row], **row_of(evaluation.logs)}
        for position, example in enumerate(self.job.task.forget[: self.job.examples]):
            said = {
                row: _answer(evaluation, position)
                for row, evaluation in self.evaluations.items()
                if "alpha " not in row or row.endswith(("alpha 0", "alpha 1"))
            }
            self.examples.append(
                {"question": example.question or "", "truth": example.answer, **said}
            )


def _answer(evaluation: Evaluation, position: int) -> str:
    asked = "forget_Q_A_ROUGE" if "forget_Q_A_ROUGE" in evaluation.logs else "forget_answers"
    return str(evaluation.logs[asked]["value_by_index"][str(position)]["generation"])


def _seeded(method: Any, seed: int) -> Any:
    """A method's config with the job's seed, wherever it keeps one."""
    changes: dict[str, Any] = {}
    for part in dataclasses.fields(method):
        value = getattr(method, part.name)
        if part.name == "seed":
            changes["seed"] = seed
        elif part.name in ("method", "training", "objective"):
            changes[part.name] = _seeded(value, seed)
    return dataclasses.replace(method, **changes)


def _eager(model: PreTrainedModel) -> PreTrainedModel:
    """With the attention that `load_model` gives, so that a run that goes on measures alike."""
    model.set_attn_implementation("eager")
    return model
