"""The commands, each a thin caller of the library. `libortho COMMAND --help` teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from libortho.cli.console import (
    EXIT_NOT_FORGOTTEN,
    console,
    progress_bars,
    reporting_errors,
    write_json,
)
from libortho.data.tokens import Template

app = typer.Typer(
    name="libortho",
    help="Split a language model's memory from its ability, and switch the memory per request.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)

Json = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON to this file.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        help="Layers to split: a module-name suffix or a regular expression; may be repeated.",
    ),
]
OrthoRatio = Annotated[
    float, typer.Option(help="Ortho parameters over the targeted layers' parameters, a fraction.")
]
Method = Annotated[
    str,
    typer.Option(
        help="geometric; saliency (sparse, by gradients); curvature (needs no forget set); or "
        "spectral (the original, data-free)."
    ),
]
TemplateOption = Annotated[
    str, typer.Option("--template", help="How a question becomes a prompt: plain or chat.")
]


def _method(name: str, ortho_ratio: float, seed: int, target_nll: float | None = None) -> Any:
    import dataclasses

    from libortho.methods import METHODS

    if name not in METHODS:
        raise ValueError(f"--method {name!r}: expected one of {', '.join(sorted(METHODS))}")
    values: dict[str, Any] = {"ortho_ratio": ortho_ratio, "seed": seed}
    if target_nll is not None:
        if "target_nll" not in {field.name for field in dataclasses.fields(METHODS[name])}:
            raise ValueError(f"--target-nll: method {name} aims at no level")
        values["target_nll"] = target_nll
    return METHODS[name](**values)


def _template(name: str) -> Template:
    if name not in ("plain", "chat"):
        raise ValueError(f"--template {name!r}: expected plain or chat")
    return name  # type: ignore[return-value]


@app.command()
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
    authors: Annotated[
        int | None, typer.Option(help="Authors to memorise (10 embedded, 12 of TOFU).")
    ] = None,
    forget_authors: Annotated[int, typer.Option(help="How many of them to forget.")] = 2,
    target: Targets = ["down_proj"],  # noqa: B006 - typer wants the default as a list
    method: Method = "geometric",
    ortho_ratio: OrthoRatio = 0.01,
    reference: Annotated[
        bool, typer.Option(help="Also fine-tune a model that never sees the forget authors.")
    ] = True,
    template: TemplateOption = "plain",
    out: Annotated[Path | None, typer.Option(help="Result folder; default: runs/<time>.")] = None,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Memorise some authors, split the model, and measure who still knows them.

    With no options this is the demo: embedded model, embedded authors, a few minutes on two cores.
    Writes summary.json, report.html and the split checkpoint; exits 3 if the authors could not be
    forgotten within the budget.
    """
    with reporting_errors():
        from libortho.data.embedded import embedded_model_path
        from libortho.data.tasks import embedded_task, tofu_task
        from libortho.evaluation.show import print_summary
        from libortho.evaluation.tofu import TofuJob, run_tofu
        from libortho.evaluation.write import run_folder, write_run
        from libortho.separate import SeparationConfig
        from libortho.training import MemoriseConfig

        task = (
            embedded_task(authors or 10, forget_authors, seed)
            if data is None
            else tofu_task(data, authors or 12, forget_authors)
        )
        folder = run_folder(out)
        job = TofuJob(
            model=model or str(embedded_model_path()),
            task=task,
            recipe=MemoriseConfig(seed=seed),
            separation=SeparationConfig(
                method=_method(method, ortho_ratio, seed), target_modules=tuple(target)
            ),
            template=_template(template),
            reference=reference,
        )
        with progress_bars() as progress:
            outcome = run_tofu(job, progress)
        write_run(outcome, folder)
        write_json(json_file, outcome.summary)
        print_summary(outcome.summary, console)
        console.print(f"\nreport  {folder / 'report.html'}\nsplit   {folder / 'split'}")
        if not outcome.report.reached:
            raise typer.Exit(EXIT_NOT_FORGOTTEN)


@app.command()
def separate(
    model: Annotated[str, typer.Argument(help="A local folder or Hugging Face name.")],
    retain: Annotated[
        Path,
        typer.Option(help='JSONL, one {"text"} or {"question", "answer"} a line: what must stay.'),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the split checkpoint.")],
    forget: Annotated[
        Path | None,
        typer.Option(help="The same, to be forgotten; --method curvature does without."),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(help="The model before it memorised: the best guide to what to say instead."),
    ] = None,
    unseen: Annotated[
        Path | None,
        typer.Option(
            help="JSONL comparable to --forget that the model never saw: how unfamiliar "
            "the forget set should become."
        ),
    ] = None,
    target_nll: Annotated[
        float | None,
        typer.Option(help="Nats per token to aim at, where neither --before nor --unseen says."),
    ] = None,
    target: Targets = ["down_proj"],  # noqa: B006
    method: Method = "geometric",
    ortho_ratio: OrthoRatio = 0.01,
    template: TemplateOption = "plain",
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Split a model of your own in two files: a base that has forgotten, and the ortho stream.

    Exits 3 if what was to be forgotten could not be, within the budget; the split is written all
    the same, and the report says how far it got. Without --forget nothing is claimed, and it exits
    0.
    """
    with reporting_errors():
        from transformers import AutoTokenizer

        from libortho.checkpoint import check_writable, save_split
        from libortho.data.examples import read_jsonl
        from libortho.evaluation.tofu import load_model
        from libortho.separate import SeparationConfig, check_forget, separate_

        # Everything that can be wrong with the arguments is found before the model is loaded.
        config = SeparationConfig(
            method=_method(method, ortho_ratio, seed, target_nll),
            target_modules=tuple(target),
            template=_template(template),
        )
        check_writable(out)
        forget_set = None if forget is None else read_jsonl(forget)
        check_forget(config, forget_set)
        retain_set = read_jsonl(retain)
        unseen_set = None if unseen is None else read_jsonl(unseen)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded = load_model(model)
        with progress_bars() as progress:
            report = separate_(
                loaded,
                forget_set,
                retain_set,
                config,
                tokenizer=tokenizer,
                before=None if before is None else load_model(before),
                unseen=unseen_set,
                progress=progress,
            )
        save_split(loaded, out, tokenizer=tokenizer, report=report)
        write_json(json_file, report.to_dict())
        console.print(str(report), highlight=False, soft_wrap=True)
        console.print(f"\nsplit   {out}")
        if report.reached is False:
            raise typer.Exit(EXIT_NOT_FORGOTTEN)


@app.command(name="eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    text: Annotated[
        Path, typer.Option(help="JSONL as for `separate`, or a plain text file (.txt).")
    ],
    alpha: Annotated[str, typer.Option(help="Comma-separated values in [0, 1].")] = "0,0.5,1",
    template: TemplateOption = "plain",
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Perplexity and probability per token of a text, at each alpha."""
    with reporting_errors():
        import torch

        from libortho.checkpoint import load_split
        from libortho.evaluation.show import print_evaluation
        from libortho.evaluation.text import evaluate_text, parse_alphas

        torch.manual_seed(seed)
        alphas = parse_alphas(alpha)
        with progress_bars() as progress:
            result = evaluate_text(
                load_split(folder), folder, text, alphas, _template(template), progress
            )
        write_json(json_file, result)
        print_evaluation(result, console)


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    alpha: Annotated[float, typer.Option(help="In [0, 1]; 0 is private.")] = 0.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show alpha 0 beside --alpha (1 if that is 0).")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="Answer this one prompt and leave.")] = None,
    template: TemplateOption = "plain",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Ask a split model, at one alpha or at two side by side. An empty line leaves."""
    with reporting_errors():
        from libortho.cli.chat import run_chat

        run_chat(
            folder,
            alphas=(0.0, alpha or 1.0) if compare else (alpha,),
            prompt=prompt,
            template=_template(template),
            max_new_tokens=max_new_tokens,
            json_file=json_file,
            seed=seed,
        )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """What a split checkpoint holds: its layers, sizes, errors, and whether ortho is there."""
    with reporting_errors():
        from libortho.checkpoint import load_split
        from libortho.separate import separation_report

        model = load_split(folder)
        report = separation_report(model)
        from libortho.alpha import ortho_layers

        present = all(layer.ortho is not None for layer in ortho_layers(model).values())
        console.print(str(report), highlight=False, soft_wrap=True)
        console.print(
            "ortho stream: present" if present else "ortho stream: absent (base-only, alpha 0)"
        )
        write_json(json_file, {"ortho_present": present, **report.to_dict()})
