"""The TOFU job for one seed: make every model, and have each measured."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from libortho.alpha import alpha_scope
from libortho.baselines.registry import Baseline
from libortho.baselines.tune import tune
from libortho.checkpoint import load_split, save_split
from libortho.data.examples import Example
from libortho.data.sampling import evenly
from libortho.data.tokens import Tokens, encode
from libortho.evaluation.entries import number
from libortho.evaluation.finetuned import FineTuned, fine_tuned, load_model
from libortho.evaluation.folder import JobFolder
from libortho.evaluation.job import TofuJob, seeded
from libortho.evaluation.measuring import Measurements
from libortho.goal import REHEARSED, Aiming
from libortho.memory import PeakMemory
from libortho.methods.graft import GraftConfig
from libortho.separate import SeparationConfig, separate_
from libortho.training import Progress

BASE_SEED = 1000
"""Added to the job's seed for the fine-tune that makes a graft's base."""


class SeedRun:
    """The job for one seed.

    Args:
        job: what to do.
        seed: of the order of the training data and of the methods' randomness.
        store: where it is kept.
        tokenizer: the model's.
        tell: called as work goes on.

    Attributes:
        measured: of every model, after `run`.
        separation: the main method's report, JSON-ready.
        tuning: baseline -> how it was tuned.
        recipe: what the fine-tunes came to.
        seconds: stage -> seconds.
    """

    def __init__(
        self, job: TofuJob, seed: int, store: JobFolder, tokenizer: Any, tell: Progress
    ) -> None:
        self.job, self.seed, self.store = job, seed, store
        self.tokenizer, self.tell = tokenizer, tell
        self.forget = self._encode(job.task.forget)
        self.retain = self._encode(job.task.retain)
        self.unseen = self._encode(job.task.unseen)
        self.measured = Measurements(job, seed, store, tokenizer, self.forget, self.retain, tell)
        self.separation: dict[str, Any] = {}
        self.tuning: dict[str, Any] = {}
        self.recipe: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def _encode(self, examples: Sequence[Example]) -> list[Tokens]:
        return [encode(e, self.tokenizer, self.job.template) for e in examples]

    def run(self) -> SeedRun:
        job = self.job
        full = self._fine_tune("full", [*self.retain, *self.forget])
        self.measured.fine_tuned("full", full)
        if job.reference:
            reference = self._fine_tune("reference", self.retain, epochs=full.epochs)
            self.measured.fine_tuned("reference", reference)
        for name, method in job.methods.items():
            if isinstance(method, SeparationConfig):
                self._split(name, method, full)
            else:
                self._unlearn(name, method, full)
        self.measured.compare()
        self.seconds["measure"] = self.measured.seconds
        return self

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

    # -- splits --------------------------------------------------------------------------------

    def _split(self, name: str, config: SeparationConfig, full: FineTuned) -> None:
        """Split the full model (or find the split that an interrupted run made), and measure."""
        main = name == self.job.main
        folder = self.store.split(self.seed, name, main=main and self.seed == self.job.seeds[0])

        @functools.cache
        def model() -> PreTrainedModel:
            return self._load_or_make_split(name, config, full, folder)

        prefix = "alpha " if main else f"{name}, alpha "
        for alpha in self.job.alphas:
            ends = alpha in (0.0, 1.0)
            self.measured.measure(
                f"{prefix}{alpha:g}",
                model,
                functools.partial(_at, model, alpha),
                full if ends and not self.job.suite.quick else None,
                shown=ends,
            )
        held = self.store.read(self.seed, f"{name}.json")
        held["seconds"] = number(held["seconds"])
        if main:
            self.separation = held["report"]
            self.seconds["split"] = held["seconds"]
        for row, values in self.measured.rows.items():
            if row.startswith(prefix):
                values |= {key: held[key] for key in ("seconds", "peak_memory")}

    def _load_or_make_split(
        self, name: str, config: SeparationConfig, full: FineTuned, folder: Path
    ) -> PreTrainedModel:
        if self.store.has(self.seed, f"{name}.json"):
            return _eager(load_split(folder))
        model = full.load()
        before, rehearsing = None, 0.0
        config = seeded(config, self.seed)
        if isinstance(config.method, GraftConfig):  # what `separate_` would do itself, but cached
            # Another seed than the reference's, or base and reference would be one model.
            training = dataclasses.replace(config.method.training, seed=self.seed + BASE_SEED)
            made = fine_tuned(self.job.model, self.retain, training, "base", self.tell)
            before, rehearsing = made.load(), number(made.seconds)
            method = dataclasses.replace(config.method, training=training)
            config = dataclasses.replace(config, method=method, earlier="trust")
        elif isinstance(config.method, Aiming):
            before = load_model(self.job.model)
            if config.earlier == "rehearse":  # what `separate_` would do by itself, but cached
                items = evenly(self.retain, REHEARSED)
                made = fine_tuned(self.job.model, items, config.rehearsal, "rehearsal", self.tell)
                before, rehearsing = made.load(), number(made.seconds)
                config = dataclasses.replace(config, earlier="rehearsed")
        # Of the sets, which are encoded already: said, so that the report has it.
        config = dataclasses.replace(config, template=self.job.template)
        clock = time.perf_counter()
        with PeakMemory() as memory:
            report = separate_(
                model,
                self.forget,
                self.retain,
                config,
                tokenizer=self.tokenizer,
                before=before,
                unseen=self.unseen or None,
                progress=self._named(name),
            )
        save_split(model, folder, tokenizer=self.tokenizer, report=report)
        found = report.to_dict()
        spent = time.perf_counter() - clock - found["seconds"].get("measure", 0.0)
        spent += rehearsing  # NaN where it was interrupted: what is not known is not 0
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

    # -- baselines -----------------------------------------------------------------------------

    def _unlearn(self, name: str, baseline: Baseline, full: FineTuned) -> None:
        """Tune a baseline to the level that the main method reached, and measure the best."""
        level = float(self.separation["target"]["reached_probability"])
        states = self.store.states(self.seed, name)

        def make() -> PreTrainedModel:
            outcome = tune(
                full.load,
                self.forget,
                self.retain,
                seeded(baseline, self.seed),
                level,
                self.job.tuning,
                self._named(name),
                states,
            )
            chosen = outcome.candidates[outcome.chosen]
            found = {
                "seconds": chosen.training_seconds,
                "peak_memory": chosen.peak_memory,
                "stopped": chosen.reached,
                "candidates": [dataclasses.asdict(c) for c in outcome.candidates],
                "chosen": outcome.chosen,
            }
            self.store.write(self.seed, f"{name}.json", found)
            return outcome.model

        self.measured.measure(name, make, shown=True)
        shutil.rmtree(states, ignore_errors=True)
        held = self.store.read(self.seed, f"{name}.json")
        self.tuning[name] = held
        self.measured.rows[name] |= {
            key: held[key] for key in ("seconds", "peak_memory", "stopped")
        }


def _at(model: Callable[[], PreTrainedModel], alpha: float) -> AbstractContextManager[Any]:
    return alpha_scope(model(), alpha)


def _eager(model: PreTrainedModel) -> PreTrainedModel:
    """With the attention that `load_model` gives, so that a run that goes on measures alike."""
    model.set_attn_implementation("eager")
    return model
