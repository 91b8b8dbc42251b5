"""`libortho separate`: split a model of one's own in two files."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import typer
from transformers import AutoTokenizer

from libortho.checkpoint import check_writable, save_split
from libortho.checkpoint.sealed import sealing_key
from libortho.cli.console import EXIT_NOT_FORGOTTEN, progress_bars, say, write_json
from libortho.cli.options import check_model
from libortho.data.examples import read_jsonl
from libortho.data.tokens import holds_question
from libortho.devices import check_device_here, offloaded
from libortho.evaluation.finetuned import load_model
from libortho.given import check_apart
from libortho.goal import Aiming
from libortho.methods import method_of
from libortho.report import SeparationReport
from libortho.separate import SeparationConfig, check_sets, needs_before, separate_
from libortho.streaming import check_streamed, separate_streamed
from libortho.workers import GATHERED_BYTES, Workers

_ASKED_PLAIN = "questions are asked as plain text; for a chat model use --template chat"


def run_streamed(
    model: str,
    config: SeparationConfig,
    *,
    out: Path,
    forgotten: str | None,
    json_file: Path | None,
    ray: str | None,
) -> None:
    """Split a model layer by layer, from disk to disk, and say what it came to."""
    check_streamed(config)
    check_writable(out)
    check_model("MODEL", model)
    with progress_bars() as progress, _cluster(ray, model) as workers:
        report = separate_streamed(
            model,
            out,
            config,
            tokenizer=AutoTokenizer.from_pretrained(model, trust_remote_code=False),
            base_model=None if Path(model).exists() else model,
            forgotten=forgotten,
            progress=progress,
            workers=workers,
        )
    _tell(report, out, json_file)


def run_separate(
    model: str,
    config: SeparationConfig,
    *,
    forget: Path | None,
    retain: Path,
    before: str | None,
    unseen: Path | None,
    out: Path,
    forgotten: str | None,
    json_file: Path | None,
    ray: str | None,
    gathered_bytes: int | None,
    device_map: str | None,
) -> None:
    """Read the sets, split the model, write the split and say what it came to."""
    # Everything that can be wrong with the arguments is found before the model is loaded.
    if gathered_bytes is not None and ray is None:
        raise ValueError("--gather is for --ray: it bounds what a worker returns")
    if device_map is not None:
        check_device_here(device_map)
        if ray is not None:
            raise ValueError("--device-map with --ray: each worker loads the model by itself")
    aims = isinstance(config.method, Aiming)
    asks = {"--unseen": (unseen, aims), "--before": (before, aims or needs_before(config))}
    for option, (value, looked_at) in asks.items():
        if value is not None and not looked_at:
            raise ValueError(f"{option}: method {method_of(config.method)} does not look at it")
    if before is None and config.earlier != SeparationConfig.earlier:
        raise ValueError(f"--earlier {config.earlier} without --before: there is no earlier model")
    if config.rehearsal != SeparationConfig.rehearsal and (
        before is None or config.earlier != "rehearse"
    ):
        raise ValueError("--learning-rate: nothing is fine-tuned without --before, rehearsed")
    check_writable(out)
    sealing_key()
    forget_set = None if forget is None else read_jsonl(forget)
    retain_set = read_jsonl(retain)
    unseen_set = None if unseen is None else read_jsonl(unseen)
    sets = {"forget": forget_set, "retain": retain_set, "unseen": unseen_set}
    check_sets(config, sets, before)
    check_apart(sets)
    check_model("MODEL", model)
    if before is not None:
        check_model("--before", before)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    asked = any(holds_question(items) for items in sets.values() if items)
    # Said before the work, which may take hours.
    if asked and config.template == "plain" and tokenizer.chat_template:
        say(_ASKED_PLAIN)
    loaded = load_model(model, device_map)
    with progress_bars() as progress, _cluster(ray, model, gathered_bytes) as workers:
        report = separate_(
            loaded,
            forget_set,
            retain_set,
            config,
            tokenizer=tokenizer,
            before=None if before is None else load_model(before, device_map),
            unseen=unseen_set,
            progress=progress,
            workers=workers,
        )
    save_split(
        loaded,
        out,
        tokenizer=tokenizer,
        report=report,
        base_model=None if Path(model).exists() else model,
        forgotten=forgotten,
        stored=offloaded(loaded),
    )
    _tell(report, out, json_file)
    if report.reached is False:
        raise typer.Exit(EXIT_NOT_FORGOTTEN)


def _cluster(
    address: str | None, model: str, gathered_bytes: int | None = None
) -> AbstractContextManager[Workers | None]:
    """The cluster at `address` for the length of a block; nothing where there is none."""
    if address is None:
        return nullcontext()
    from libortho.integrations.ray import RayWorkers

    return RayWorkers(address, model, gathered_bytes=gathered_bytes or GATHERED_BYTES)


def _tell(report: SeparationReport, out: Path, json_file: Path | None) -> None:
    write_json(json_file, report.to_dict())
    say(str(report))
    say(f"\nsplit   {out}")
