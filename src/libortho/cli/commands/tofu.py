"""`libortho tofu`: the job of `evaluation.tofu`, from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import typer

from libortho.baselines.lora_null import LoraNullConfig
from libortho.baselines.registry import BASELINES, Baseline, baseline
from libortho.baselines.tune import TuneConfig
from libortho.cli.console import EXIT_NOT_FORGOTTEN, console, progress_bars, say, write_json
from libortho.cli.options import at_learning_rate, check_model, method_config
from libortho.config import BaseConfig, Storage
from libortho.data.embedded import embedded_model_path
from libortho.data.examples import read_words
from libortho.data.tasks import Task, TofuSplit, embedded_task, tofu_benchmark, tofu_task
from libortho.data.tokens import Template
from libortho.evaluation.job import TofuJob
from libortho.evaluation.show import print_summary
from libortho.evaluation.suite import SuiteConfig
from libortho.evaluation.text import parse_alphas
from libortho.evaluation.tofu import run_tofu
from libortho.evaluation.write import run_folder, write_summary
from libortho.methods import METHODS
from libortho.separate import SeparationConfig
from libortho.training import MemoriseConfig

ALPHAS = {"quick": "0,1", "full": "0,0.25,0.5,0.75,1"}


def run_job(
    task: Task,
    *,
    model: str | None,
    methods: Sequence[str],
    targets: tuple[str, ...],
    ortho_ratio: float,
    base: str,
    suite: str,
    limit: int | None,
    alpha: str | None,
    wikitext: Path | None,
    baseline_epochs: int,
    learning_rate: float,
    reference: bool,
    template: Template,
    thorough: bool,
    seeds: tuple[int, ...],
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Run the job that the options describe, write what it came to, and print it.

    `thorough` asks for the full suite where `suite` does not say; so do several methods or seeds.
    """
    thorough = thorough or len(methods) > 1 or len(seeds) > 1
    kind = suite or ("full" if thorough else "quick")
    if kind not in ("quick", "full"):
        raise ValueError(f"--suite {suite!r}: expected quick or full")
    if model is not None:
        check_model("--model", model)
    job = TofuJob(
        model=model or str(embedded_model_path()),
        task=task,
        methods=_contenders(methods, targets, ortho_ratio, base, learning_rate),
        recipe=MemoriseConfig(learning_rate=learning_rate),
        suite=SuiteConfig(quick=kind == "quick", limit=limit),
        alphas=tuple(parse_alphas(alpha or ALPHAS[kind])),
        template=template,
        reference=reference,
        seeds=seeds,
        tuning=TuneConfig(max_epochs=baseline_epochs),
        wikitext=None if wikitext is None else read_words(wikitext),
    )
    with run_folder(out) as folder, progress_bars() as progress:
        summary = run_tofu(job, folder, progress)
    write_summary(summary, folder)
    write_json(json_file, summary)
    print_summary(summary, console)
    say(f"\nreport  {folder / 'report.html'}\nsplit   {folder / 'split'}")
    if not all(one["reached"] for one in summary["seeds"].values()):
        raise typer.Exit(EXIT_NOT_FORGOTTEN)


def make_task(
    data: str | None,
    split: str | None,
    authors: int | None,
    forget_authors: int | None,
    seed: int,
) -> Task:
    """What the options say is memorised and forgotten."""
    if split is not None:
        if data is None:
            raise ValueError(f"--split {split}: needs --data, a folder in TOFU's layout")
        if authors is not None or forget_authors is not None:
            raise ValueError(f"--split {split}: says which authors; leave out their numbers")
        return tofu_benchmark(data, cast("TofuSplit", split))
    if forget_authors is None:
        forget_authors = 2
    if authors is None:
        authors = 10 if data is None else 12
    if data is None:
        return embedded_task(authors, forget_authors, seed)
    return tofu_task(data, authors, forget_authors)


def _contenders(
    names: Sequence[str],
    targets: tuple[str, ...],
    ortho_ratio: float,
    base: str,
    learning_rate: float,
) -> dict[str, SeparationConfig | Baseline]:
    found: dict[str, SeparationConfig | Baseline] = {}
    for name in names:
        if name in BASELINES:
            config = baseline(name)
            if isinstance(config, LoraNullConfig):  # a split of the same layers, stored alike
                stored = BaseConfig(cast("Storage", base))
                config = dataclasses.replace(
                    config, target_modules=targets, ortho_ratio=ortho_ratio, base=stored
                )
            found[name] = config
        elif name in METHODS:
            method = method_config(name, ortho_ratio, 0, base)
            split = SeparationConfig(method=method, target_modules=targets)
            found[name] = at_learning_rate(split, learning_rate)
        else:
            known = ", ".join([*METHODS, *BASELINES])
            raise ValueError(f"--methods {name!r}: expected one of {known}")
    return found
