"""The commands, each a thin caller of the library. `libortho COMMAND --help` teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libortho.cli.console import (
    EXIT_NOT_FORGOTTEN,
    console,
    progress_bars,
    reporting_errors,
    write_json,
)
from libortho.cli.export import export
from libortho.cli.options import (
    Base,
    Json,
    Method,
    OrthoRatio,
    Seed,
    Targets,
    TemplateOption,
    check_template,
    method_config,
)
from libortho.cli.tofu import tofu

app = typer.Typer(
    name="libortho",
    help="Split a language model's memory from its ability, and switch the memory per request.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)


app.command()(tofu)
app.command()(export)


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
    base: Base = "int8",
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
        from libortho.evaluation.finetuned import load_model
        from libortho.separate import SeparationConfig, check_forget, separate_

        # Everything that can be wrong with the arguments is found before the model is loaded.
        config = SeparationConfig(
            method=method_config(method, ortho_ratio, seed, base, target_nll),
            target_modules=tuple(target),
            template=check_template(template),
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
                load_split(folder), folder, text, alphas, check_template(template), progress
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
            template=check_template(template),
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
