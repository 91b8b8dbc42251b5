"""`libortho inspect`, `eval` and `chat`: what a split is asked, and in which form."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import ASKED_PLAIN, run, separate

from libortho.cli.options import split_template
from libortho.errors import CheckpointError


def test_separate_eval_inspect_chat(folder: Path) -> None:
    made = separate(folder, "--json", folder / "report.json")
    assert made.exit_code == 0, made.output
    report = json.loads((folder / "report.json").read_text())
    assert report["reached"]
    assert report["totals"]["density"] <= 0.2
    assert (folder / "split" / "ortho.safetensors").is_file()

    evaluated = run(
        "eval", folder / "split", "--text", folder / "forget.jsonl", "--alpha", "0,0.5,1",
        "--json", folder / "eval.json",
    )  # fmt: skip
    assert evaluated.exit_code == 0, evaluated.output
    result = json.loads((folder / "eval.json").read_text())
    assert set(result["perplexity"]) == {"0.0", "0.5", "1.0"}
    assert result["perplexity"]["0.0"] == pytest.approx(report["forget_ppl"]["0.0"], rel=0.02)
    assert result["perplexity"]["1.0"] == pytest.approx(report["forget_ppl"]["1.0"], rel=0.02)

    seen = run("inspect", folder / "split", "--json", folder / "inspect.json")
    assert seen.exit_code == 0, seen.output
    assert "ortho stream: present" in seen.output
    inspected = json.loads((folder / "inspect.json").read_text())
    assert [x["name"] for x in inspected["layers"]] == [x["name"] for x in report["layers"]]

    said = run(
        "chat", folder / "split", "--prompt", "where is it ?", "--compare", "--max-new-tokens", 4,
        "--json", folder / "chat.json",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    (turn,) = json.loads((folder / "chat.json").read_text())["turns"]
    assert set(turn["answers"]) == {"0.0", "1.0"}


def test_a_split_is_asked_in_the_form_in_which_it_was_measured(folder: Path, monkeypatch) -> None:
    made = separate(folder, "--template", "chat", "--json", folder / "report.json")
    assert made.exit_code in (0, 3), made.output
    assert ASKED_PLAIN not in made.output
    report = json.loads((folder / "report.json").read_text())
    assert run("strip", folder / "split", "--out", folder / "base").exit_code == 0

    def perplexity(place: str, *more: str) -> float:
        done = run(
            "eval", folder / place, "--text", folder / "forget.jsonl", "--alpha", 0,
            "--json", folder / "e.json", *more,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        return json.loads((folder / "e.json").read_text())["perplexity"]["0.0"]

    own = perplexity("split")
    assert own == pytest.approx(report["forget_ppl"]["0.0"], rel=0.02)
    assert own == perplexity("split", "--template", "chat") == perplexity("base")
    plain = perplexity("split", "--template", "plain")
    assert plain != pytest.approx(own, rel=0.02)
    (folder / "base" / "report.json").unlink()
    assert perplexity("base") == plain  # what it does not say is as it always was

    told = []
    monkeypatch.setattr(
        "libortho.cli.commands.chat.run_chat", lambda *_, template, **__: told.append(template)
    )
    for words in (["split"], ["split", "--template", "plain"], ["base"]):
        assert run("chat", folder / words[0], *words[1:]).exit_code == 0
    assert told == ["chat", "plain", "plain"]


@pytest.mark.parametrize(
    ("report", "found"),
    [
        (None, None),
        ({}, None),
        ({"settings": {}}, None),
        ({"settings": {"template": None}}, None),
        ({"settings": {"template": "chat"}}, "chat"),
        ({"settings": {"template": "plain"}}, "plain"),
    ],
)
def test_the_form_that_a_folder_records(tmp_path: Path, report, found) -> None:
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    assert split_template(None, tmp_path, "chat") == (found or "chat")
    assert split_template(None, tmp_path, "plain") == (found or "plain")
    assert split_template("chat", tmp_path, "plain") == "chat"


@pytest.mark.parametrize(
    ("settings", "told"), [({"template": "latin"}, "settings.template='latin'"), ([], "settings=")]
)
def test_a_form_that_there_is_not_is_named(tmp_path: Path, settings, told: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(CheckpointError, match=rf"report\.json: {re.escape(told)}"):
        split_template(None, tmp_path, "chat")
    assert split_template("plain", tmp_path, "chat") == "plain"


def test_plain_text_is_evaluated_in_windows(folder: Path) -> None:
    assert separate(folder).exit_code in (0, 3)
    text = folder / "plain.txt"
    text.write_text("she is in the red house . " * 40, encoding="utf-8")
    made = run("eval", folder / "split", "--text", text, "--json", folder / "e.json")
    assert made.exit_code == 0, made.output
    assert json.loads((folder / "e.json").read_text())["tokens"] == 7 * 40


def test_base_only_refuses_alpha(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert separate(folder).exit_code in (0, 3)
    made = run("strip", folder / "split", "--out", folder / "base", "--json", folder / "s.json")
    assert made.exit_code == 0, made.output
    told = json.loads((folder / "s.json").read_text())
    assert told["files"] == sorted(p.name for p in (folder / "base").iterdir())
    assert told["blocks"] > 0
    assert "none of them was found" in " ".join(made.output.split())
    shutil.rmtree(folder / "split")
    (folder / "base").rename(folder / "split")
    text = folder / "forget.jsonl"
    assert run("eval", folder / "split", "--text", text, "--alpha", "0").exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr("libortho.evaluation.text.sequence_nll", None)  # nothing is measured first
        refused = run("eval", folder / "split", "--text", text, "--alpha", "0,1")
    assert refused.exit_code == 2
    assert "no ortho stream" in refused.output
    assert "absent" in run("inspect", folder / "split").output
    assert run("chat", folder / "split", "--prompt", "it", "--alpha", 1).exit_code == 2


def test_an_ordinary_model_is_no_split(folder: Path) -> None:
    for command in (["eval", "--text", folder / "forget.jsonl"], ["inspect"], ["chat"], ["serve"]):
        refused = run(command[0], folder / "model", *command[1:])
        assert refused.exit_code == 2, refused.output
        said = " ".join(refused.output.split())
        assert f"{folder / 'model'} is a model, and no split of one: expected" in said
        assert "`libortho separate`" in said


def test_a_text_is_read_before_the_model(folder: Path, monkeypatch) -> None:
    assert separate(folder).exit_code in (0, 3)

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a long wait")

    monkeypatch.setattr("libortho.cli.commands.evaluate.load_split", load)
    (folder / "bad.jsonl").write_text("{")
    (folder / "bad.txt").write_bytes(b"\xff")
    for name, told in (
        ("none.jsonl", "no such file"), ("bad.jsonl", "line 1"), ("bad.txt", "not text in UTF-8")
    ):  # fmt: skip
        refused = run("eval", folder / "split", "--text", folder / name)
        assert refused.exit_code == 2, refused.output
        assert told in refused.output
    refused = run("eval", "no-such-split", "--text", folder / "forget.jsonl")
    assert "no-such-split does not exist: expected the folder of a split" in refused.output


def test_what_cannot_be_asked(folder: Path, monkeypatch) -> None:
    """Nothing to answer, and no split: neither is a success, and nobody asks the hub for one."""
    assert separate(folder).exit_code in (0, 3)
    empty = run("chat", folder / "split", "--prompt", " ")
    assert empty.exit_code == 2
    assert "--prompt ' ': expected something" in empty.output
    monkeypatch.chdir(folder)
    missing = run("chat", "no-such-split", "--prompt", "it")
    assert missing.exit_code == 2
    assert "no-such-split does not exist: expected the folder of a split" in missing.output


def test_chat_without_standard_input_ends(folder: Path, monkeypatch) -> None:
    assert separate(folder).exit_code in (0, 3)
    monkeypatch.setattr("libortho.cli.commands.chat.console.input", _closed)
    assert run("chat", folder / "split").exit_code == 0


def _closed(*_: object) -> str:
    raise RuntimeError("input(): lost sys.stdin")
