"""The commands' options, and what each is for. `libortho COMMAND --help` teaches.

Only what `--help` needs is imported here. A command's work is the module of its name in
`libortho.cli.commands`; it is imported, with all it needs, when the command is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libortho._version import __version__
from libortho.cli.attack import attack
from libortho.cli.console import reporting_errors, say
from libortho.cli.export import export
from libortho.cli.options import (
    LEARNING_RATE,
    Base,
    DeviceMap,
    EarlierOption,
    Json,
    LearningRate,
    Method,
    OrthoRatio,
    Seed,
    SplitTemplate,
    Targets,
    TemplateOption,
    at_learning_rate,
    check_earlier,
    check_template,
    method_config,
    split_template,
)
from libortho.cli.serve import keys, serve, ui
from libortho.cli.strip import strip
from libortho.cli.tofu import tofu
from libortho.cli.vault import OrthoKeyFile, encrypt, rotate_key, use_key_file
from libortho.separate import SeparationConfig

app = typer.Typer(
    name="libortho",
    help="Split a language model's memory from its ability, and switch the memory per request.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        say(f"libortho {__version__}")
        raise typer.Exit


@app.callback()
def before_any_command(
    context: typer.Context,
    ortho_key_file: OrthoKeyFile = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_say_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Split a language model's memory from its ability, and switch the memory per request."""
    if ortho_key_file is not None:
        use_key_file(context, ortho_key_file)


app.command()(tofu)
app.command()(strip)
app.command()(encrypt)
app.command()(rotate_key)
app.command()(serve)
app.command()(ui)
app.add_typer(keys, name="keys")
app.command()(attack)
app.command()(export)


@app.command()
def separate(
    model: Annotated[
        str,
        typer.Argument(
            help="A local folder or Hugging Face name. It is loaded, and its split saved, in bf16."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the split checkpoint.")],
    retain: Annotated[
        Path | None,
        typer.Option(
            help='JSONL, one {"text"} or {"question", "answer"} a line: what must stay. '
            "Needed unless --stream."
        ),
    ] = None,
    forget: Annotated[
        Path | None,
        typer.Option(help="The same, to be forgotten; --method curvature does without."),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(help="The model before it memorised: the best guide to what to say instead."),
    ] = None,
    earlier: EarlierOption = "rehearse",
    learning_rate: LearningRate = LEARNING_RATE,
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
    forgotten: Annotated[
        str | None,
        typer.Option(help="What was forgotten, for the model card, in words that anyone may read."),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Layer by layer from disk to disk, for a model larger than memory; goes on where "
            "it was if killed. For --method spectral, which looks at weights alone.",
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster that does what is independent: statistics of texts, "
            "layers. Every machine of it must find MODEL under the same name."
        ),
    ] = None,
    device_map: DeviceMap = None,
    gather: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --ray: GiB of statistics that a worker returns at most (2; one layer's at "
            "least). Less takes less memory and more passes over the text.",
        ),
    ] = None,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Split a model of your own in two files: a base that has forgotten, and the ortho stream.

    Whatever it is stored in, MODEL is loaded in bf16, with eager attention.

    Exits 3 if what was to be forgotten could not be, within the budget; the split is written all
    the same, and the report says how far it got. Without --forget nothing is claimed, and it exits
    0.
    """
    with reporting_errors():
        from libortho.cli.commands.separate import run_separate, run_streamed

        config = SeparationConfig(
            method=method_config(method, ortho_ratio, seed, base, target_nll),
            target_modules=tuple(target),
            earlier=check_earlier(earlier),
            template=check_template(template),
        )
        config = at_learning_rate(config, learning_rate)
        if ray == "":
            raise ValueError(
                "--ray '': expected the address of a cluster, such as 10.0.0.1:6379, or auto"
            )
        if stream:
            unread = {
                "--forget": forget,
                "--retain": retain,
                "--unseen": unseen,
                "--before": before,
                "--gather": gather,
                "--device-map": device_map,
                "--learning-rate": None if learning_rate == LEARNING_RATE else learning_rate,
                "--earlier": None if earlier == SeparationConfig.earlier else earlier,
                "--template": None if template == SeparationConfig.template else template,
            }
            for option, value in unread.items():
                if value is not None:
                    raise ValueError(f"{option} with --stream: it would not be looked at")
            run_streamed(
                model,
                config,
                out=out,
                forgotten=forgotten,
                json_file=json_file,
                ray=ray,
            )
            return
        if retain is None:
            raise ValueError("--retain is missing: what must stay (only --stream does without)")
        run_separate(
            model,
            config,
            forget=forget,
            retain=retain,
            before=before,
            unseen=unseen,
            out=out,
            forgotten=forgotten,
            json_file=json_file,
            ray=ray,
            gathered_bytes=None if gather is None else int(gather * 2**30),
            device_map=device_map,
        )


@app.command(name="eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    text: Annotated[
        Path, typer.Option(help="JSONL as for `separate`, or a plain text file (.txt).")
    ],
    alpha: Annotated[str, typer.Option(help="Comma-separated values in [0, 1].")] = "0,0.5,1",
    template: SplitTemplate = None,
    device_map: DeviceMap = None,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Perplexity and probability per token of a text, at each alpha."""
    with reporting_errors():
        from libortho.cli.commands.evaluate import run_evaluate

        run_evaluate(
            folder,
            text,
            alpha=alpha,
            template=split_template(template, folder, "plain"),
            json_file=json_file,
            seed=seed,
            device_map=device_map,
        )


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    alpha: Annotated[float, typer.Option(help="In [0, 1]; 0 is private.")] = 0.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show alpha 0 beside --alpha (1 if that is 0).")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="Answer this one prompt and leave.")] = None,
    template: SplitTemplate = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Ask a split model, at one alpha or at two side by side. An empty line leaves."""
    with reporting_errors():
        from libortho.cli.commands.chat import run_chat

        run_chat(
            folder,
            alphas=(0.0, alpha or 1.0) if compare else (alpha,),
            prompt=prompt,
            template=split_template(template, folder, "plain"),
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
        from libortho.cli.commands.inspect import run_inspect

        run_inspect(folder, json_file)
