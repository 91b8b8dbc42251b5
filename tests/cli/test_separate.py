"""`libortho separate`, from the outside: exit status, files, and what the user is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from commands import ASKED_PLAIN, run, separate, write_jsonl

from libortho import separation_report
from libortho.checkpoint import is_split, load_split, read_manifest


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


@pytest.mark.parametrize("option", ["--earlier=show", "--template=chat", "--learning-rate=1e-5"])
def test_what_a_streamed_split_does_not_look_at_is_refused(folder: Path, option: str) -> None:
    made = run(
        "separate", folder / "model", "--out", folder / "split", "--stream", "--method", "spectral",
        option,
    )  # fmt: skip
    assert made.exit_code == 2, made.output
    assert f"{option.partition('=')[0]} with --stream: it would not be looked at" in made.output
    assert not (folder / "split").exists()
