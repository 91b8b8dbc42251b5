"""`libortho export`: a split checkpoint in the form of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libortho.cli.console import progress_bars, reporting_errors, say, write_json
from libortho.cli.options import Json

if TYPE_CHECKING:
    from libortho.export import ExportReport

# Which options mean something to which target; any other that is given is an error.
OPTIONS = {
    "dense": {"alpha", "dtype"},
    "peft": {"alphas", "dtype"},
    "compressed-tensors": {"alphas", "activations", "dtype"},
    "gguf": {"alphas", "storage"},
}


def export(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="dense: a plain model at --alpha. peft: a plain base, and the ortho stream as an "
            "adapter. compressed-tensors: an INT8 base for vLLM, and LoRA. gguf: for llama.cpp.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            help="dense: the alpha that is built in; if not given 0, the base without ortho stream."
        ),
    ] = None,
    alphas: Annotated[
        str | None,
        typer.Option(help="Also write adapters scaled to these, with commas, such as 0.25,0.5."),
    ] = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="No adapter: the memory stays out of the export.")
    ] = False,
    activations: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors: 16bit (default: the base as it is; vLLM on a GPU) or int8 "
            "(W8A8, runs on a CPU too)."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the weights that stay dense: bfloat16, float16 or float32; as the model has "
            "them, if not given."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="gguf: f16 (the default), bf16, f32 or q8_0 for the base's matrices."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Write a split checkpoint in the form of another tool. OUT must be new.

    [bold]peft[/] and [bold]compressed-tensors[/] write OUT/base, which holds no memory, and beside
    it OUT/ortho (alpha 1) and, with --alphas, OUT/ortho-0.5 and so on.
    """
    with reporting_errors():
        from libortho.checkpoint import load_split
        from libortho.export.run import check_new, export_split

        given = {
            "alpha": alpha,
            "alphas": _alphas(alphas, base_only),
            "activations": activations,
            "dtype": dtype,
            "storage": storage,
        }
        config = _config(to, {key: value for key, value in given.items() if value is not None})
        check_new(out)
        with progress_bars() as progress:
            progress(f"export to {to}", 0, 1)
            # A dense model at alpha 0 is the base alone too, and needs no key for the rest.
            alone = base_only or getattr(config, "alpha", None) == 0
            model = load_split(folder, base_only=alone)
            report = export_split(model, out, config, tokenizer=_tokenizer(folder))
            progress(f"export to {to}", 1, 1)
        write_json(json_file, report.to_dict())
        _show(report, out)


def _alphas(text: str | None, base_only: bool) -> tuple[float, ...] | None:
    from libortho.evaluation.text import parse_alphas

    if base_only:
        if text is not None:
            raise ValueError(f"--alphas {text} with --base-only: expected one of them")
        return ()
    if text is None:
        return None
    return tuple(dict.fromkeys((1.0, *parse_alphas(text))))


def _config(to: str, given: dict[str, Any]) -> Any:
    from libortho.export import TARGETS

    if to not in TARGETS:
        raise ValueError(f"--to {to!r}: expected one of {', '.join(sorted(TARGETS))}")
    for key in given:
        if key not in OPTIONS[to]:
            option = "--base-only" if given[key] == () else f"--{key}"
            raise ValueError(f"{option} says nothing to --to {to}")
    return TARGETS[to].config(**given)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _show(report: ExportReport, out: Path) -> None:
    lines = [
        f"{report.layers} split layers; storing their base moves it by {report.weight_error:.2g} "
        "(relative, worst layer)"
    ]
    if report.empty:
        lines.append(
            f"{len(report.empty)} of them have an empty ortho stream and so no part in an adapter: "
            + ", ".join(report.empty)
        )
    lines += [
        f"adapter {out / name}: alpha {value:g}, holds the memory"
        for name, value in report.adapters.items()
    ]
    if report.max_rank is not None:
        lines.append(f"largest LoRA rank: {report.max_rank}")
    for line in (*lines, *report.notes, f"\n{report.target}   {out}"):
        say(line)
