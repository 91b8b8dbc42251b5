"""Measure each of a seed's models once: kept in the job's folder, and taken from there after."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedModel

import libortho
from libortho.data.sampling import evenly
from libortho.data.tokens import Tokens, prompt_ids
from libortho.evaluation.compare import with_reference
from libortho.evaluation.finetuned import FineTuned, load_model, model_identity
from libortho.evaluation.folder import JobFolder, read_evaluation, write_evaluation
from libortho.evaluation.generation import greedy
from libortho.evaluation.job import TofuJob
from libortho.evaluation.rows import row_of
from libortho.evaluation.suite import MEASURED_FORMAT, Evaluation, evaluate_suite
from libortho.evaluation.suite_data import SuiteData
from libortho.files import cache_dir
from libortho.scoring import mean_token_kl
from libortho.training import Progress

QUICK_TOKENS = 32
"""Longest answer that the quick suite shows."""

KL_SEQUENCES = 40
"""Sequences of each set, evenly spread, over which the distance to the full model is averaged."""


class Measurements:
    """One seed's models, measured.

    Args:
        job: what is measured, and how.
        seed: whose models they are.
        store: where measurements are kept.
        tokenizer: the model's.
        forget, retain: the task's sets, encoded.
        tell: called as work goes on.

    Attributes:
        evaluations: row -> a model's measurements.
        rows: row -> the same as numbers, with what else is known of the model.
        seconds: spent on measuring.
    """

    def __init__(
        self,
        job: TofuJob,
        seed: int,
        store: JobFolder,
        tokenizer: Any,
        forget: Sequence[Tokens],
        retain: Sequence[Tokens],
        tell: Progress,
    ) -> None:
        self.evaluations: dict[str, Evaluation] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self._job, self._seed, self._store = job, seed, store
        self._tokenizer, self._tell = tokenizer, tell
        self._forget, self._retain = forget, retain
        self._data = SuiteData.of_task(job.task, job.wikitext)

    def fine_tuned(self, row: str, made: FineTuned) -> None:
        """`measure`, or what another job measured of this very model in the same way."""
        job = self._job
        described = [
            MEASURED_FORMAT,
            libortho.__version__,
            made.folder.name,
            job.model,
            model_identity(job.model),
            dataclasses.asdict(self._data),
            dataclasses.asdict(job.suite),
            job.template,
            job.examples,
        ]
        text = json.dumps(described, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:20]
        cache = cache_dir() / "measured" / digest
        new = self._store.evaluation(self._seed, row) is None
        held = read_evaluation(cache) if new else None
        if held is not None:
            self._store.keep(self._seed, row, held)
        self.measure(row, made.load, shown=True)
        if new:  # what an earlier run left has been compared with this job's reference already
            write_evaluation(self.evaluations[row], cache)

    def measure(
        self,
        row: str,
        make: Callable[[], PreTrainedModel],
        scope: Callable[[], AbstractContextManager[Any]] | None = None,
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
        held = self._store.evaluation(self._seed, row)
        if held is None:
            model = make()
            clock = time.perf_counter()
            with scope() if scope else nullcontext():
                held = self._evaluate(row, model, full, shown)
            self.seconds += time.perf_counter() - clock
            self._store.keep(self._seed, row, held)
        self.evaluations[row] = held
        self.rows[row] = row_of(held.logs)

    def compare(self) -> None:
        """Compare every model with the reference, if there is one."""
        reference = self.evaluations.get("reference")
        for row, evaluation in self.evaluations.items():
            if reference is not None:
                compared = with_reference(evaluation, reference.logs)
                self._store.keep(self._seed, row, compared)
                self.evaluations[row] = evaluation = compared
            self.rows[row] = {**self.rows[row], **row_of(evaluation.logs)}

    def examples(self) -> list[dict[str, str]]:
        """The answers that are shown: of each question, the truth and what each model says.

        What the full model knows best comes first: that tells what was forgotten from what is a
        near tie, in which any rounding decides.
        """
        known = self.evaluations["full"].logs["forget_Q_A_Prob"]["value_by_index"]
        shown = range(min(self._job.examples, len(self._job.task.forget)))
        surest = sorted(shown, key=lambda position: -known[str(position)]["prob"])
        return [
            {
                "question": example.question or "",
                "truth": example.answer,
                **{
                    row: _answer(evaluation, position)
                    for row, evaluation in self.evaluations.items()
                    if "alpha " not in row or row.endswith(("alpha 0", "alpha 1"))
                },
            }
            for position in surest
            for example in [self._job.task.forget[position]]
        ]

    def _evaluate(
        self, row: str, model: PreTrainedModel, full: FineTuned | None, shown: bool
    ) -> Evaluation:
        evaluation = evaluate_suite(
            model,
            self._tokenizer,
            self._data,
            self._job.suite,
            template=self._job.template,
            pretrained=self._pretrained,
            progress=lambda stage, done, total: self._tell(f"{row}: {stage}", done, total),
        )
        if self._job.suite.quick and shown:
            evaluation.logs["forget_answers"] = self._answers(model)
        if full is not None:
            items = [*evenly(self._forget, KL_SEQUENCES), *evenly(self._retain, KL_SEQUENCES)]
            kl = mean_token_kl(full.load(), model, items)
            evaluation.logs["kl_to_full"] = {"agg_value": kl}
        return evaluation

    @functools.cached_property
    def _pretrained(self) -> PreTrainedModel | None:
        return None if self._job.suite.quick else load_model(self._job.model)

    def _answers(self, model: PreTrainedModel) -> dict[str, Any]:
        """Greedy answers to the first forget questions, in the shape of a metric's entry."""
        prompts = [
            prompt_ids(e.question or "", self._job.template, self._tokenizer)
            for e in self._job.task.forget[: self._job.examples]
        ]
        said = greedy(model, self._tokenizer, prompts, QUICK_TOKENS)
        by_index = {str(i): {"generation": text} for i, text in enumerate(said)}
        return {"agg_value": None, "value_by_index": by_index}


def _answer(evaluation: Evaluation, position: int) -> str:
    asked = "forget_Q_A_ROUGE" if "forget_Q_A_ROUGE" in evaluation.logs else "forget_answers"
    return str(evaluation.logs[asked]["value_by_index"][str(position)]["generation"])
