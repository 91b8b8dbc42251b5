"""What holds for every command: help, models, files, and what is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run, separate

import libortho
from libortho.cli.console import progress_bars


def test_every_command_explains_itself() -> None:
    for command in ("separate", "tofu", "eval", "chat", "inspect"):
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "--json" in shown.output
        assert "--seed" in shown.output


def test_help_says_what_a_model_is_made_of() -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("separate", "--help").output).split())
    assert "in bf16" in shown
    # the fine-tune of a graft's base: libortho.training.MemoriseConfig
    for part in ("AdamW at 0.0002", "batches of 8", "14 epochs", "0.88"):
        assert part in shown
    assert "on the CPU" in run("serve", "--help").output


def test_the_version() -> None:
    shown = run("--version")
    assert (shown.exit_code, shown.output) == (0, f"libortho {libortho.__version__}\n")


def test_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "libortho", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"libortho {libortho.__version__}\n"


A_MODEL = "expected the folder of a causal LM or its Hugging Face name"


@pytest.mark.parametrize("name", ["./no-model", "a/b/c", "", "empty", "forget.jsonl"])
@pytest.mark.parametrize("command", ["separate", "stream", "before", "tofu"])
def test_a_place_without_a_model_is_named_at_once(
    folder: Path, monkeypatch, command: str, name: str
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a long wait")

    monkeypatch.setattr("libortho.cli.commands.separate.load_model", load)
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    sets = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "out"]
    option, arguments = {
        "separate": ("MODEL", ["separate", name, *sets]),
        "stream": ("MODEL", ["separate", name, "--stream", "--method=spectral", "--out", "out"]),
        "before": ("--before", ["separate", "model", *sets, "--before", name]),
        "tofu": ("--model", ["tofu", "--model", name, "--out", "out"]),
    }[command]
    refused = run(*arguments)
    assert refused.exit_code == 2, refused.output
    said = " ".join(refused.output.split())
    why = "holds no config.json" if Path(name).name in ("empty", "forget.jsonl") else "is not there"
    # nothing of the hub, which would be waited for
    assert said.endswith(f"{option} {name!r} {why}: {A_MODEL}")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("also_a_model", [False, True])
def test_an_adapter_is_no_model(folder: Path, also_a_model: bool) -> None:
    """transformers would load it with its base, and the split would be saved without it."""
    if not also_a_model:
        (folder / "model" / "config.json").unlink()
    (folder / "model" / "adapter_config.json").write_text("{}")
    refused = separate(folder)
    assert refused.exit_code == 2, refused.output
    said = " ".join(refused.output.split())
    assert "is a PEFT adapter (it holds adapter_config.json): merge it first" in said
    assert "merge_and_unload()" in said
    assert not (folder / "split").exists()


def test_a_name_that_the_hub_does_not_know_is_named(folder: Path, monkeypatch) -> None:
    def ask(*_: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("transformers.utils.hub.cached_file", ask)
    refused = run(
        "separate", "no/such", "--forget", folder / "forget.jsonl",
        "--retain", folder / "retain.jsonl", "--out", folder / "split",
    )  # fmt: skip
    assert refused.exit_code == 2, refused.output
    told = f"MODEL 'no/such' is not there: {A_MODEL} (the hub: We couldn't connect to the hub)"
    assert refused.output.strip().endswith(told)


def test_names_in_brackets_are_printed_as_they_are(folder: Path) -> None:
    """What rich would take for markup, in a path longer than a line."""
    place = folder / "a [bold] place" / ("long" * 30)
    place.mkdir(parents=True)
    for name in ("model", "forget.jsonl", "retain.jsonl"):
        (folder / name).rename(place / name)
    made = separate(place)
    assert f"\nsplit   {place / 'split'}\n" in made.output
    stripped = run("strip", place / "split", "--out", place / "base")
    assert f"base    {place / 'base'}\n" in stripped.output
    measured = run("eval", place / "split", "--text", place / "forget.jsonl", "--alpha", 0)
    assert "a[bold]place" in "".join(measured.output.split())
    export = run("export", place / "split", "--to", "dense", "--out", place / "plain")
    assert f"dense   {place / 'plain'}\n" in export.output


@pytest.mark.parametrize(
    ("place", "told"), [(".", "is a directory"), ("forget.jsonl/r.json", "cannot be made in it")]
)
def test_where_json_cannot_be_written_is_told_before_the_work(
    folder: Path, place: str, told: str
) -> None:
    refused = separate(folder, "--json", folder / place)
    assert refused.exit_code == 2
    assert told in re.sub(r"[\s│]+", " ", refused.output)
    assert not (folder / "split").exists()


@pytest.mark.parametrize(
    ("stage", "shown"),
    [("base INT8", "base INT8 ..."), ("full: epoch 3, answer probability 0.7", "full: epoch ...")],
)
def test_a_stage_keeps_its_name(stage: str, shown: str, capsys) -> None:
    with progress_bars() as progress:
        progress(stage, 0, 1)
    assert capsys.readouterr().err.strip() == shown
