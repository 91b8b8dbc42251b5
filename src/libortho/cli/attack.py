"""`libortho attack`: the attacks of `libortho.attacks`, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from libortho.cli.console import (
    EXIT_NOT_FORGOTTEN,
    console,
    progress_bars,
    reporting_errors,
    say,
    write_json,
)
from libortho.cli.options import Json, Seed, SplitTemplate, check_model, split_template


def attack(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    forget: Annotated[
        Path,
        typer.Option(
            help='JSONL, {"question", "answer"} and TOFU\'s keys: what it forgot. Of a {"text"} '
            "only what asks no question is tried."
        ),
    ],
    retain: Annotated[Path, typer.Option(help="The same: what it still knows.")],
    holdout: Annotated[
        Path | None,
        typer.Option(
            help="The same about what no model has seen, nor the split (other ones than its "
            "--unseen); without it membership is not judged."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The model fine-tuned without the forget set; without it nothing is judged."
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="The public model before it memorised; the difference attack needs it."),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a further model to attack; may be repeated."),
    ] = None,
    original: Annotated[
        bool, typer.Option(help="Also attack the split at alpha 1, for scale.")
    ] = True,
    attacks: Annotated[
        str, typer.Option(help="Which, with commas; default: all that are registered.")
    ] = "",
    size: Annotated[str, typer.Option(help="small (minutes) or full.")] = "small",
    template: SplitTemplate = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Result folder; default: runs/<time>. Given that of an interrupted run of the "
            "same attacks, it goes on."
        ),
    ] = None,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Try to get back what a split model forgot, beside models that never knew it.

    Models other than the split are loaded in bf16; all compute on the CPU, with eager attention.

    Writes attacks.json and attacks.png. Exits 3 if the base gives more away than the bars allow;
    the bars are set beside --reference, and without it there are numbers alone, and it exits 0.
    """
    with reporting_errors():
        from transformers import AutoTokenizer

        from libortho.attacks.common import AttackData
        from libortho.attacks.registry import ATTACKS, Size, attack_configs
        from libortho.attacks.show import draw_attacks, print_attacks
        from libortho.attacks.suite import BASE, ORIGINAL, REFERENCE, Source, run_attacks
        from libortho.checkpoint import read_manifest
        from libortho.checkpoint.names import ortho_file
        from libortho.data.examples import read_jsonl
        from libortho.evaluation.finetuned import load_model, model_identity
        from libortho.evaluation.write import run_folder

        names = [name.strip() for name in attacks.split(",")] if attacks else list(ATTACKS)
        configs = attack_configs(names, cast("Size", size), seed)
        sources = {BASE: Source(str(folder))}
        if reference is not None:
            sources[REFERENCE] = Source(reference)
        manifest = read_manifest(folder)
        if original and ortho_file(folder) is None:
            say(f"{folder} has no ortho stream: alpha 1 is not attacked")
        elif original:
            sources[ORIGINAL] = Source(str(folder), alpha=1.0)
        others = _beside(beside or [], set(sources))
        sources |= {name: Source(place) for name, place in others.items()}
        given = [("--reference", reference), ("--pretrained", pretrained)]
        for option, place in (*given, *(("--beside", place) for place in others.values())):
            if place is not None:
                check_model(option, place)
        data = AttackData(
            tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            forget=tuple(read_jsonl(forget)),
            retain=tuple(read_jsonl(retain)),
            holdout=() if holdout is None else tuple(read_jsonl(holdout)),
            template=split_template(template, folder, "plain"),
            pretrained=None if pretrained is None else load_model(pretrained),
        )
        described: dict[str, Any] = {
            "seed": seed,
            "pretrained": None if pretrained is None else [pretrained, model_identity(pretrained)],
        }
        with run_folder(out) as results, progress_bars() as progress:
            summary = run_attacks(
                sources, tuple(manifest.layers), data, configs, results, progress, described
            )
        draw_attacks(summary, results / "attacks.png")
        write_json(json_file, summary)
        print_attacks(summary, console)
        say(f"\nresults  {results / 'attacks.json'}\npicture  {results / 'attacks.png'}")
        if not all(bar["holds"] for bar in summary["bars"]):
            raise typer.Exit(EXIT_NOT_FORGOTTEN)


def _beside(given: list[str], taken: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise ValueError(f"--beside {text!r}: expected NAME=FOLDER")
        if name in taken or name in found:
            raise ValueError(f"--beside {text!r}: there is a model {name!r} already")
        found[name] = place
    return found
