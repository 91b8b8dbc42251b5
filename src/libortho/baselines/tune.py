"""tune: the same small budget for every baseline, a grid of learning rates."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from libortho.baselines.registry import Baseline, run_baseline_
from libortho.baselines.unlearn import UnlearnConfig
from libortho.config import check_count, check_fraction, check_positive
from libortho.data.sampling import evenly
from libortho.data.tokens import Tokens, as_tokens
from libortho.report import SeparationReport
from libortho.scoring import answer_probability, sequence_nll
from libortho.training import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROUNDING = 0.01
"""Probability above the level that a run which landed on it may be moved to by its storage."""


@dataclass(frozen=True)
class TuneConfig:
    """The budget.

    Attributes:
        learning_rate_factors: the grid, as multiples of the baseline's own learning rate. By
            default from a fifth of it to four times: for methods that train the whole model, from
            OpenUnlearning's 1e-5 to the 2e-4 of the fine-tune that memorised.
        max_epochs: of each run.
        retain_sequences: how many of the retain set, evenly spread over it, its probability is
            measured on.
        least_retain: share of the original retain probability below which a model counts as broken
            where none reached the level.
    """

    learning_rate_factors: tuple[float, ...] = (0.2, 1.0, 4.0)
    max_epochs: int = 10
    retain_sequences: int = 200
    least_retain: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning_rate_factors", tuple(self.learning_rate_factors))
        if not self.learning_rate_factors:
            raise ValueError("learning_rate_factors is empty: expected at least one factor")
        for factor in self.learning_rate_factors:
            check_positive("learning_rate_factors", factor)
        check_count("max_epochs", self.max_epochs, 1)
        check_count("retain_sequences", self.retain_sequences, 1)
        check_fraction("least_retain", self.least_retain, zero=True)


@dataclass(frozen=True)
class Candidate:
    """One run of the grid. Of a split, probabilities are those at alpha = 0, after quantising.

    Attributes:
        learning_rate: of this run.
        steps, epochs, diverged, training_seconds, measuring_seconds, peak_memory: as in
            `UnlearnOutcome`.
        reached: the forget probability is at or below the level, up to `ROUNDING`.
        forget_probability, retain_probability: per token, fractions; NaN where it diverged so far.
        seconds: wall time, measurements included; at least the two above.
    """

    learning_rate: float
    steps: int
    epochs: int
    reached: bool
    diverged: bool
    forget_probability: float
    retain_probability: float
    training_seconds: float
    measuring_seconds: float
    peak_memory: int
    seconds: float


@dataclass(frozen=True)
class TuneOutcome:
    """What tuning chose.

    Attributes:
        model: the chosen run's model.
        report: of its split, for a baseline that makes one.
        chosen: index into `candidates`.
        candidates: every run, in the grid's order.
        original_retain_probability: before any unlearning.
        seconds: wall time of all runs.
    """

    model: PreTrainedModel
    report: SeparationReport | None
    chosen: int
    candidates: tuple[Candidate, ...]
    original_retain_probability: float
    seconds: float


def tune(
    make_model: Callable[[], PreTrainedModel],
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    baseline: Baseline,
    stop_at: float,
    config: TuneConfig | None = None,
    progress: Progress | None = None,
    states: Path | None = None,
) -> TuneOutcome:
    """Run a baseline at each learning rate of the grid and keep the best model (see `best_of`).

    Two models are in memory at most: the best so far and the one that is being made.

    Args:
        make_model: makes a fresh copy of the original model; called once a run.
        forget, retain, stop_at: as `unlearn_`.
        baseline: its config; learning rate and epochs are the grid's.
        config: the budget.
        progress: called after every step.
        states: a folder of the caller's for this very tuning. What is found there is not done
            again, and tuning ends with the models and numbers of an uninterrupted one. The caller
            removes it.

    Raises:
        ValueError, TypeError: as `unlearn_` and `lora_null_`.
    """
    config = config or TuneConfig()
    start = time.perf_counter()
    forget, retain = as_tokens(forget, "forget"), as_tokens(retain, "retain")
    sample = evenly(retain, config.retain_sequences)
    rates = [factor * _training(baseline).learning_rate for factor in config.learning_rate_factors]
    candidates: list[Candidate] = []
    original = math.nan
    kept: tuple[PreTrainedModel, SeparationReport | None] | None = None
    for number, rate in enumerate(rates, start=1):
        model = make_model()
        if number == 1:
            original = _probability(model, sample)
        clock = time.perf_counter()
        outcome, report = run_baseline_(
            model,
            forget,
            retain,
            _with(baseline, rate, config.max_epochs),
            _labelled(progress, f"learning rate {rate:.2g} ({number} of {len(rates)})"),
            stop_at,
            None if states is None else states / f"run-{number}",
        )
        # A split is what is deployed of it: quantising moves it from where training landed.
        forgotten = outcome.probability if report is None else report.target["reached_probability"]
        candidates.append(
            Candidate(
                learning_rate=rate,
                steps=outcome.steps,
                epochs=outcome.epochs,
                reached=forgotten <= stop_at + ROUNDING,
                diverged=outcome.diverged,
                forget_probability=forgotten,
                retain_probability=_probability(model, sample),
                training_seconds=outcome.training_seconds,
                measuring_seconds=outcome.measuring_seconds,
                peak_memory=outcome.peak_memory,
                # Of a run that was resumed, the clock has seen only the rest.
                seconds=max(
                    time.perf_counter() - clock,
                    outcome.training_seconds + outcome.measuring_seconds,
                ),
            )
        )
        if best_of(candidates, original, config.least_retain) == len(candidates) - 1:
            kept = model, report
        del model
    assert kept is not None
    return TuneOutcome(
        model=kept[0],
        report=kept[1],
        chosen=best_of(candidates, original, config.least_retain),
        candidates=tuple(candidates),
        original_retain_probability=original,
        seconds=time.perf_counter() - start,
    )


def best_of(
    candidates: Sequence[Candidate], original_retain: float, least_retain: float = 0.5
) -> int:
    """Index of the run to keep; the first of equals.

    Of those that reached the level, the one with the highest retain probability. Where none did,
    the one with the lowest forget probability among those whose retain probability is at least
    `least_retain` times the original; where all are worse, the one with the highest.
    """
    retain = [_or(c.retain_probability, 0.0) for c in candidates]
    forget = [_or(c.forget_probability, 1.0) for c in candidates]
    everyone = range(len(candidates))
    reached = [i for i in everyone if candidates[i].reached]
    alive = [i for i in everyone if retain[i] >= least_retain * original_retain]
    if not reached and alive:
        return min(alive, key=forget.__getitem__)
    return max(reached or everyone, key=retain.__getitem__)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def _probability(model: PreTrainedModel, items: Sequence[Tokens]) -> float:
    return answer_probability(sequence_nll(model, items))


def _training(baseline: Baseline) -> UnlearnConfig:
    return baseline if isinstance(baseline, UnlearnConfig) else baseline.training


def _with(baseline: Baseline, learning_rate: float, max_epochs: int) -> Baseline:
    training = dataclasses.replace(
        _training(baseline), learning_rate=learning_rate, max_epochs=max_epochs
    )
    if isinstance(baseline, UnlearnConfig):
        return training
    return dataclasses.replace(baseline, training=training)


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)
