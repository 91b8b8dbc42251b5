"""`libortho tofu`: the job of `evaluation.tofu`, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from libortho.cli.console import (
    EXIT_NOT_FORGOTTEN,
    console,
    progress_bars,
    reporting_errors,
    write_json,
)
from libortho.cli.options import (
    Base,
    Json,
    OrthoRatio,
    Seed,
    Targets,
    TemplateOption,
    check_template,
    method_config,
)

ALPHAS = {"quick": "0,1", "full": "0,0.25,0.5,0.75,1"}


def tofu(
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder in TOFU's layout or a hub name (locuslab/TOFU); default: the embedded "
            "fictional authors."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A local folder or Hugging Face name; default: the embedded SmolLM2."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="forget01, forget05 or forget10: the whole benchmark, of --data."),
    ] = None,
    authors: Annotated[
        int | None, typer.Option(help="Authors to memorise (10 embedded, 12 of TOFU).")
    ] = None,
    forget_authors: Annotated[
        int | None, typer.Option(help="How many of them to forget; default: 2.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="With commas. What splits: geometric, saliency, curvature, spectral. Baselines: "
            "graddiff, npo, simnpo, rmu, lora-null. The first one must split; the bars are about "
            "it."
        ),
    ] = "geometric",
    target: Targets = ["down_proj"],  # noqa: B006 - typer wants the default as a list
    ortho_ratio: OrthoRatio = 0.01,
    base: Base = "int8",
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Where splits are measured, with commas; default: 0,0.25,0.5,0.75,1 with the "
            "full suite, 0,1 with the quick one."
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="quick: probabilities, truth ratio, memorisation, membership. full: all of TOFU, "
            "with generated answers and general knowledge. Default: full with --split or several "
            "--methods or --seeds, else quick."
        ),
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(help="At most so many questions of each set that utility is measured on."),
    ] = None,
    wikitext: Annotated[
        Path | None, typer.Option(help="A text file; its perplexity is measured, too.")
    ] = None,
    baseline_epochs: Annotated[
        int,
        typer.Option(
            help="Passes over the forget set at most, at each of a baseline's learning rates.",
            min=1,
        ),
    ] = 10,
    reference: Annotated[
        bool, typer.Option(help="Also fine-tune a model that never sees the forget authors.")
    ] = True,
    template: TemplateOption = "plain",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Result folder; default: runs/<time>. Given that of an interrupted run of the "
            "same job, it goes on."
        ),
    ] = None,
    json_file: Json = None,
    seed: Seed = 0,
    seeds: Annotated[
        str | None, typer.Option(help="Several seeds, with commas; the table shows medians.")
    ] = None,
) -> None:
    """Memorise some authors, split the model, and measure who still knows them.

    With no options this is the demo: embedded model, embedded authors, a few minutes on two cores.
    Writes summary.json, report.html, the split checkpoint and OpenUnlearning's result files; exits
    3 if the authors could not be forgotten within the budget.
    """
    with reporting_errors():
        from libortho.baselines.tune import TuneConfig
        from libortho.data.embedded import embedded_model_path
        from libortho.evaluation.show import print_summary
        from libortho.evaluation.suite import SuiteConfig
        from libortho.evaluation.text import parse_alphas
        from libortho.evaluation.tofu import TofuJob, run_tofu
        from libortho.evaluation.write import run_folder, write_summary

        names = [name.strip() for name in methods.split(",")]
        job_seeds = (seed,) if seeds is None else _integers(seeds)
        thorough = split is not None or len(names) > 1 or len(job_seeds) > 1
        kind = suite or ("full" if thorough else "quick")
        if kind not in ("quick", "full"):
            raise ValueError(f"--suite {suite!r}: expected quick or full")
        job = TofuJob(
            model=model or str(embedded_model_path()),
            task=_task(data, split, authors, forget_authors, seed),
            methods=_contenders(names, tuple(target), ortho_ratio, base),
            suite=SuiteConfig(quick=kind == "quick", limit=limit),
            alphas=tuple(parse_alphas(alpha or ALPHAS[kind])),
            template=check_template(template),
            reference=reference,
            seeds=job_seeds,
            tuning=TuneConfig(max_epochs=baseline_epochs),
            wikitext=None if wikitext is None else wikitext.read_text(encoding="utf-8"),
        )
        folder = run_folder(out)
        with progress_bars() as progress:
            summary = run_tofu(job, folder, progress)
        write_summary(summary, folder)
        write_json(json_file, summary)
        print_summary(summary, console)
        console.print(f"\nreport  {folder / 'report.html'}\nsplit   {folder / 'split'}")
        if not all(one["reached"] for one in summary["seeds"].values()):
            raise typer.Exit(EXIT_NOT_FORGOTTEN)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--seeds {text!r}: expected integers with commas, such as 0,1,2"
        ) from None


def _task(
    data: str | None,
    split: str | None,
    authors: int | None,
    forget_authors: int | None,
    seed: int,
) -> Any:
    from libortho.data.tasks import TofuSplit, embedded_task, tofu_benchmark, tofu_task

    if split is not None:
        if data is None:
            raise ValueError(f"--split {split}: needs --data, a folder in TOFU's layout")
        if authors is not None or forget_authors is not None:
            raise ValueError(f"--split {split}: says which authors; leave out their numbers")
        return tofu_benchmark(data, cast("TofuSplit", split))
    if data is None:
        return embedded_task(authors or 10, forget_authors or 2, seed)
    return tofu_task(data, authors or 12, forget_authors or 2)


def _contenders(
    names: list[str], targets: tuple[str, ...], ortho_ratio: float, base: str
) -> dict[str, Any]:
    from libortho.baselines.registry import BASELINES, baseline
    from libortho.methods import METHODS
    from libortho.separate import SeparationConfig

    found: dict[str, Any] = {}
    for name in names:
        if name in BASELINES:
            found[name] = baseline(name)
        elif name in METHODS:
            method = method_config(name, ortho_ratio, 0, base)
            found[name] = SeparationConfig(method=method, target_modules=targets)
        else:
            known = ", ".join([*METHODS, *BASELINES])
            raise ValueError(f"--methods {name!r}: expected one of {known}")
    return found
