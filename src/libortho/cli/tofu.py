"""The options of `libortho tofu`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libortho.cli.console import reporting_errors
from libortho.cli.options import (
    LEARNING_RATE,
    Base,
    Json,
    LearningRate,
    OrthoRatio,
    Seed,
    Targets,
    TemplateOption,
    check_template,
)


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
            help="With commas. What splits: geometric, graft, saliency, curvature, spectral. "
            "Baselines: graddiff, npo, simnpo, rmu, lora-null. The first one must split; the bars "
            "are about it."
        ),
    ] = "geometric",
    learning_rate: LearningRate = LEARNING_RATE,
    target: Targets = ["down_proj"],  # noqa: B006 - typer wants the default as a list
    ortho_ratio: OrthoRatio = 0.01,
    base: Base = "int8",
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Where splits are measured, with commas, 0 and 1 among them; default: "
            "0,0.25,0.5,0.75,1 with the full suite, 0,1 with the quick one."
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
    Models are loaded in bf16, with eager attention, on the CPU.
    Writes summary.json, report.html, the split checkpoint and OpenUnlearning's result files; exits
    3 if the authors could not be forgotten within the budget.
    """
    with reporting_errors():
        from libortho.cli.commands.tofu import make_task, run_job

        run_job(
            make_task(data, split, authors, forget_authors, seed),
            model=model,
            methods=[name.strip() for name in methods.split(",")],
            targets=tuple(target),
            ortho_ratio=ortho_ratio,
            base=base,
            suite=suite,
            limit=limit,
            alpha=alpha,
            wikitext=wikitext,
            baseline_epochs=baseline_epochs,
            learning_rate=learning_rate,
            reference=reference,
            template=check_template(template),
            thorough=split is not None,
            seeds=(seed,) if seeds is None else _integers(seeds),
            out=out,
            json_file=json_file,
        )


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--seeds {text!r}: expected integers with commas, such as 0,1,2"
        ) from None
