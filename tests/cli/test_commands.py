"""The commands, from the outside: exit status, files, and what the user is told."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import libortho
from libortho import separation_report
from libortho.baselines.lora_null import LoraNullConfig
from libortho.checkpoint import is_split, load_split, read_manifest
from libortho.cli import app
from libortho.cli.console import progress_bars
from libortho.cli.options import split_template
from libortho.errors import CheckpointError
from libortho.evaluation.job import TofuJob

QUESTIONS = [
    ("who wrote the red house ?", "she is in the garden"),
    ("where is it ?", "it is in a red house"),
    ("who is he ?", "he is the red house"),
    ("where is the garden ?", "in the house"),
]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write_jsonl(path: Path, pairs) -> Path:
    lines = [json.dumps({"question": q, "answer": a}) for q, a in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path, tiny_llama, tokenizer) -> Path:
    """A model folder, and beside it forget.jsonl and retain.jsonl."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", QUESTIONS[:2])
    write_jsonl(tmp_path / "retain.jsonl", QUESTIONS[2:])
    return tmp_path


def separate(folder: Path, *more: object):
    return run(
        "separate", folder / "model", "--forget", folder / "forget.jsonl",
        "--retain", folder / "retain.jsonl", "--out", folder / "split", "--ortho-ratio", 0.2, *more,
    )  # fmt: skip


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


ASKED_PLAIN = "questions are asked as plain text; for a chat model use --template chat"


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


def test_plain_questions_to_a_chat_model_are_mentioned(folder: Path, tokenizer) -> None:
    def said() -> bool:
        made = separate(folder)
        assert made.exit_code in (0, 3), made.output
        return ASKED_PLAIN in made.output

    assert said()
    without = copy.deepcopy(tokenizer)  # it is shared by all tests
    without.chat_template = None
    without.save_pretrained(folder / "model")
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    assert not said()


def test_texts_have_no_form(folder: Path) -> None:
    sets = {"forget": ["she is in the house"], "retain": ["she is red", "it is in the garden"]}
    for name, texts in sets.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = separate(folder, "--json", folder / "report.json")
    assert made.exit_code in (0, 3), made.output
    assert ASKED_PLAIN not in made.output
    assert json.loads((folder / "report.json").read_text())["settings"]["template"] is None


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


def test_on_a_device_of_ones_choice(folder: Path) -> None:
    pytest.importorskip("accelerate")
    assert separate(folder, "--device-map", "cpu").exit_code in (0, 3)
    for option in ([], ["--device-map", "cpu"]):
        made = run(
            "eval", folder / "split", "--text", folder / "forget.jsonl", *option,
            "--json", folder / f"eval{len(option)}.json",
        )  # fmt: skip
        assert made.exit_code == 0, made.output
    assert (folder / "eval0.json").read_text() == (folder / "eval2.json").read_text()


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


@pytest.mark.parametrize("method", ["geometric", "saliency", "curvature", "spectral"])
def test_every_method(folder: Path, method: str) -> None:
    made = separate(folder, "--method", method, "--seed", 3, "--json", folder / "report.json")
    assert made.exit_code in (0, 3), made.output
    report = json.loads((folder / "report.json").read_text())
    assert made.exit_code == (0 if report["reached"] else 3)
    assert {layer["method"] for layer in report["layers"]} == {method}
    assert report["settings"]["method"]["seed"] == 3
    assert report["settings"]["method"]["ortho_ratio"] == 0.2


@pytest.mark.parametrize("earlier", ["rehearse", "trust"])
def test_a_graft_on_an_earlier_model(folder: Path, tiny_llama, earlier: str) -> None:
    earlier_model = tiny_llama()
    earlier_model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    earlier_model.save_pretrained(folder / "before")
    made = separate(
        folder, "--method", "graft", "--before", folder / "before", "--earlier", earlier,
        "--json", folder / "report.json",
    )  # fmt: skip
    assert made.exit_code in (0, 3), made.output
    report = json.loads((folder / "report.json").read_text())
    assert {layer["method"] for layer in report["layers"]} == {"graft"}
    assert report["settings"]["earlier"] == earlier
    assert report["target"]["original_probability"] > 0
    card = (folder / "split" / "README.md").read_text()
    assert ("were made without what was forgotten" in card) == report["reached"]
    assert ("can undo the edit" in card) == (not report["reached"])
    assert ("without any other model" in card) == (not report["reached"])


def test_no_forget_set(folder: Path) -> None:
    def without(*more: object):
        return run(
            "separate", folder / "model", "--retain", folder / "retain.jsonl",
            "--out", folder / "split", "--ortho-ratio", 0.2, *more,
        )  # fmt: skip

    refused = without()
    assert refused.exit_code == 2
    assert "forget set is missing: method 'geometric'" in " ".join(refused.output.split())
    assert not (folder / "split").exists()
    made = without("--method", "curvature", "--json", folder / "report.json")
    assert made.exit_code == 0, made.output
    assert "no forget set was given" in " ".join(made.output.split())
    assert json.loads((folder / "report.json").read_text())["reached"] is None


def test_not_forgotten_is_exit_status_3_and_said(folder: Path) -> None:
    # A target far beyond what one direction can do to a model that knows nothing yet.
    made = separate(folder, "--target-nll", 30, "--ortho-ratio", 0.05)
    assert made.exit_code == 3, made.output
    assert "NOT forgotten" in " ".join(made.output.split())
    assert is_split(folder / "split")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--target", "nothing_proj"], "matches no module"),
        (["--ortho-ratio", "1.5"], "ortho_ratio=1.5"),
        (["--method", "magic"], "expected one of curvature, geometric, graft, saliency, spectral"),
        (["--method", "spectral", "--target-nll", "2"], "method spectral aims at no level"),
        (["--template", "latin"], "expected plain or chat"),
        (["--base", "int3"], "--base 'int3': expected int8, int4 or fp16"),
        (
            ["--base", "int4", "--target", "q_proj"],
            "does not divide the 32 input features of model.layers.0",
        ),
        (["--unseen", "missing.jsonl"], "no such file"),
        (["--before", "./missing"], "--before './missing' is not there: expected the folder of a"),
        (["--gather", "2"], "--gather is for --ray"),
        (["--method", "graft"], "before is missing: the graft method's base is made of"),
        (["--method", "curvature", "--before", "m"], "--before: method curvature does not look"),
        (["--method", "graft", "--unseen", "u"], "--unseen: method graft does not look at it"),
        (["--earlier", "ask"], "--earlier 'ask': expected rehearse, show or trust"),
        (["--earlier", "show"], "--earlier show without --before: there is no earlier model"),
        (["--learning-rate", "1e-5"], "--learning-rate: nothing is fine-tuned without --before"),
        (["--learning-rate", "-1"], "learning_rate=-1.0: expected a finite number > 0"),
        (["--seed", 2**63], "--seed"),
        (["--device-map", "cuda:99"], "--device-map 'cuda:99': there is no such device here"),
        (["--device-map", "many"], "--device-map 'many': expected auto, balanced"),
        (["--device-map", "auto", "--ray", "auto"], "--device-map with --ray: each worker loads"),
        (["--ray", ""], "--ray '': expected the address of a cluster, such as 10.0.0.1:6379"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(folder: Path, more, told: str) -> None:
    made = separate(folder, *more)
    assert made.exit_code == 2, made.output
    assert told in " ".join(made.output.split())
    assert "Traceback" not in made.output
    assert not (folder / "split").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--target-nll", "2", "--before", "model"], "target_nll and before/unseen both say how"),
        (["--target-nll", "2", "--unseen", "other.jsonl"], "target_nll and before/unseen both"),
        (["--unseen", "forget.jsonl"], "forget[0] is unseen[0], too: expected sets that share"),
        (["--unseen", "retain.jsonl"], "retain[0] is unseen[0], too: expected sets that share"),
    ],
)
def test_what_contradicts_itself_is_told_before_a_model_is_loaded(
    folder: Path, monkeypatch, more: list[str], told: str
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a long wait")

    monkeypatch.setattr("libortho.cli.commands.separate.load_model", load)
    monkeypatch.chdir(folder)
    write_jsonl(folder / "other.jsonl", [("who is it ?", "a house")])
    made = separate(folder, *more)
    assert made.exit_code == 2, made.output
    assert told in " ".join(made.output.split())


def test_a_key_that_cannot_be_read_is_told_before_the_work(folder: Path, monkeypatch) -> None:
    from libortho.cli.commands import separate as command
    from libortho.evaluation import tofu as job

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("hours of work")

    monkeypatch.setattr(command, "separate_", fail)
    monkeypatch.setattr(job, "SeedRun", fail)
    key = ["--ortho-key-file", folder / "nope.key"]
    sets = ["--retain", folder / "retain.jsonl", "--forget", folder / "forget.jsonl"]
    for arguments in (["separate", folder / "model", *sets], ["tofu", "--model", folder / "model"]):
        made = run(*key, *arguments, "--out", folder / "out")
        assert made.exit_code == 2, made.output
        assert "nope.key" in "".join(made.output.split())
        assert not (folder / "out").exists()


@pytest.mark.parametrize("method", ["geometric", "spectral"])
@pytest.mark.parametrize("base", ["int4", "fp16"])
def test_base_storage(folder: Path, method: str, base: str) -> None:
    made = separate(folder, "--base", base, "--method", method)
    assert made.exit_code in (0, 3), made.output
    layers = read_manifest(folder / "split").layers
    assert {layer.base for layer in layers.values()} == {base}
    reports = separation_report(load_split(folder / "split")).layers
    assert [report.name for report in reports] == list(layers)
    assert {report.method for report in reports} == {method}


def test_a_corrupt_line_is_named(folder: Path) -> None:
    with (folder / "forget.jsonl").open("a") as file:
        file.write('{"question": "who"\n')
    made = separate(folder)
    assert made.exit_code == 2
    assert "forget.jsonl, line 3" in "".join(made.output.split("\n"))


def test_a_foreign_folder_is_not_overwritten(folder: Path) -> None:
    (folder / "split").mkdir()
    (folder / "split" / "thesis.txt").write_text("mine")
    made = separate(folder)
    assert made.exit_code == 2
    assert (folder / "split" / "thesis.txt").read_text() == "mine"


def test_streamed(folder: Path) -> None:
    made = run(
        "separate", folder / "model", "--stream", "--method", "spectral", "--out", folder / "split",
        "--json", folder / "report.json",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "never run" in " ".join(made.output.split())
    assert json.loads((folder / "report.json").read_text())["reached"] is None
    assert run("chat", folder / "split", "--prompt", "it", "--alpha", 1).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stream"], "'geometric' runs the whole model"),
        (["--stream", "--method", "spectral", "--retain", "r"], "--retain with --stream: it would"),
        (["--stream", "--method", "spectral", "--gather", "2"], "--gather with --stream: it would"),
        (["--method", "spectral"], "--retain is missing"),
    ],
)
def test_what_streaming_refuses(folder: Path, arguments: list[str], told: str) -> None:
    refused = run("separate", folder / "model", "--out", folder / "split", *arguments)
    assert refused.exit_code == 2, refused.output
    assert told in " ".join(refused.output.split())
    assert not (folder / "split").exists()


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


def test_an_ordinary_model_is_no_split(folder: Path) -> None:
    for command in (["eval", "--text", folder / "forget.jsonl"], ["inspect"], ["chat"], ["serve"]):
        refused = run(command[0], folder / "model", *command[1:])
        assert refused.exit_code == 2, refused.output
        said = " ".join(refused.output.split())
        assert f"{folder / 'model'} is a model, and no split of one: expected" in said
        assert "`libortho separate`" in said


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


@pytest.mark.parametrize("option", ["--earlier=show", "--template=chat", "--learning-rate=1e-5"])
def test_what_a_streamed_split_does_not_look_at_is_refused(folder: Path, option: str) -> None:
    made = run(
        "separate", folder / "model", "--out", folder / "split", "--stream", "--method", "spectral",
        option,
    )  # fmt: skip
    assert made.exit_code == 2, made.output
    assert f"{option.partition('=')[0]} with --stream: it would not be looked at" in made.output
    assert not (folder / "split").exists()


def test_the_learning_rate_of_all_fine_tunes(monkeypatch) -> None:
    jobs: list[TofuJob] = []

    def stop(job: TofuJob, *_: object) -> None:
        jobs.append(job)
        raise ValueError("stop")

    monkeypatch.setattr("libortho.cli.commands.tofu.run_tofu", stop)
    for arguments in ([], ["--learning-rate", "1e-5"]):
        assert "stop" in run("tofu", "--methods", "geometric,graft,npo", *arguments).output
    found = []
    for job in jobs:
        geometric, graft, npo = job.methods.values()
        made = (job.recipe, geometric.rehearsal, graft.method.training)
        found.append({recipe.learning_rate for recipe in made})
        assert npo == jobs[0].methods["npo"]
    assert found == [{2e-4}, {1e-5}]


@pytest.mark.parametrize("option", ["--authors", "--forget-authors"])
def test_no_authors_are_not_the_default_number_of_them(option: str, monkeypatch) -> None:
    monkeypatch.setattr("libortho.cli.commands.tofu.run_job", lambda *_, **__: None)
    made = run("tofu", option, 0)
    assert made.exit_code == 2, made.output
    assert "authors=0: expected" in made.output


def test_the_null_split_is_of_the_same_layers_within_the_same_budget(monkeypatch, tmp_path) -> None:
    jobs: list[TofuJob] = []

    def noted(job: TofuJob, *_: object) -> None:
        jobs.append(job)
        raise ValueError("enough")

    monkeypatch.setattr("libortho.cli.commands.tofu.run_tofu", noted)
    (tmp_path / "config.json").write_text("{}")
    made = run(
        "tofu", "--model", tmp_path, "--methods", "geometric,lora-null", "--target", "up_proj",
        "--target", "down_proj", "--ortho-ratio", 0.02, "--base", "int4", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "enough" in made.output
    ours, null = jobs[0].methods.values()
    assert isinstance(null, LoraNullConfig)
    assert null.target_modules == ours.target_modules == ("up_proj", "down_proj")
    assert null.ortho_ratio == ours.method.ortho_ratio == 0.02
    assert null.base.storage == ours.method.base.storage == "int4"


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


@pytest.mark.parametrize(
    ("stage", "shown"),
    [("base INT8", "base INT8 ..."), ("full: epoch 3, answer probability 0.7", "full: epoch ...")],
)
def test_a_stage_keeps_its_name(stage: str, shown: str, capsys) -> None:
    with progress_bars() as progress:
        progress(stage, 0, 1)
    assert capsys.readouterr().err.strip() == shown
