"""All attacks on all models: the bars, going on after a kill, the files, the command."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from libortho.attacks import Score
from libortho.attacks.extraction import ASKING, ExtractionConfig
from libortho.attacks.registry import ATTACKS, attack_configs
from libortho.attacks.relearning import STEPS, RelearningConfig
from libortho.attacks.show import draw_attacks, print_attacks
from libortho.attacks.suite import Source, attack_bars, run_attacks
from libortho.cli import app
from libortho.files import json_text

LAYERS = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
CHEAP = ["membership", "difference"]


@pytest.fixture
def sources(world) -> dict[str, Source]:
    return {
        "alpha 0": Source(str(world.split)),
        "reference": Source(str(world.reference)),
        "alpha 1": Source(str(world.split), alpha=1.0),
    }


def scores(**values: dict[str, Score]) -> dict[str, Any]:
    return {"scores": {who: [s.to_dict() for s in made] for who, made in values.items()}}


def test_bars_are_about_the_worst_beside_the_reference() -> None:
    def rated(*values: float) -> list[Score]:
        return [Score(f"way {i}", "recall", value) for i, value in enumerate(values)]

    def after(shift: float, name: str) -> Score:
        return Score(name, "answer probability", 0.2, details={"shift": shift})

    def steps(value: float, other: float) -> list[Score]:
        details = {"reached": True}
        return [
            Score("a", STEPS, value, None, (), details),
            Score("b", STEPS, other, None, (), details),
        ]

    results = {
        "extraction": scores(
            **{"alpha 0": [*rated(0.50, 0.30), Score("only here", "recall", 1.0)]},
            reference=rated(0.48, 0.24),
            **{"alpha 1": rated(0.9, 0.9)},
        ),
        "membership": scores(**{"alpha 0": rated(0.0)}, reference=rated(0.3)),
        "perturbation": scores(
            **{"alpha 0": [after(0.01, "INT4, x"), after(-0.03, "INT4, y"), after(0.5, "noise")]},
            reference=[after(0.0, "INT4, x")],
        ),
        "relearning": scores(**{"alpha 0": steps(30.0, 20.0)}, reference=steps(60.0, 20.0)),
    }
    bars = {bar.bar: bar for bar in attack_bars(results)}
    told = [(b.bar.split(" (worst: ")[1], b.value, b.required, b.holds) for b in bars.values()]
    assert told == [
        ("way 1)", pytest.approx(0.06), "<= 0.05", False),
        ("way 0)", pytest.approx(-0.3), "<= 0.02", True),
        ("INT4, y)", pytest.approx(0.03), "<= 0.02", False),
        ("INT4, x)", pytest.approx(0.0), "<= 0.05", True),
        ("a)", pytest.approx(0.5), ">= 0.7", False),
    ]
    for result in results.values():
        result["scores"]["another"] = result["scores"]["alpha 0"]
    others = attack_bars(results, "another")
    assert [b.bar for b in others] == [f"another: {name}" for name in bars]
    assert [b.value for b in others] == [b.value for b in bars.values()]
    del results["membership"]["scores"]["reference"]
    assert attack_bars(results) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "value", "holds"),
    [
        ((0, True), (0, True), 1.0, True),
        ((0, True), (5, True), 0.0, False),
        ((5, True), (0, True), math.inf, True),
        ((5, True), (10, True), 0.5, False),
        ((60, False), (40, True), 1.5, True),
        ((60, False), (60, False), 1.0, True),
        ((55, True), (60, False), 55 / 60, False),  # the reference may need any number
    ],
)
def test_steps_beside_the_reference(ours, theirs, value: float, holds: bool) -> None:
    def made(steps: float, reached: bool) -> list[Score]:
        return [Score("a", STEPS, steps, details={"reached": reached})]

    results = {"relearning": scores(**{"alpha 0": made(*ours)}, reference=made(*theirs))}
    (bar,) = attack_bars(results)
    assert bar.value == pytest.approx(value)
    assert bar.holds is holds
    assert ("never recalls" in bar.bar) == (ours[1] and not theirs[1])


@pytest.mark.parametrize("diverged", ["alpha 0", "reference"])
def test_what_one_model_alone_has_is_not_withstood(diverged: str) -> None:
    made = [Score(name, STEPS, 9.0, details={"reached": True}) for name in ("a", "b")]
    held = {"alpha 0": made, "reference": made, diverged: made[:1]}
    kept, alone = attack_bars({"relearning": scores(**held)})
    assert kept.holds
    assert alone.bar == "relearning: scores of one model alone (b)"
    assert (alone.value, alone.holds) == (1, False)


@pytest.mark.parametrize("file", [False, True])
def test_a_score_that_is_not_finite_does_not_hold(file: bool, tmp_path: Path) -> None:
    """NaN of a perturbed model, which a file has as null."""

    def made(attack: str, first: float, second: float) -> list[Score]:
        shift = {"shift": second}
        return [
            Score("INT4, a", attack, first, None, (), shift),
            Score("b", attack, second, None, (first, second)),
        ]

    results = {
        "perturbation": scores(
            **{"alpha 0": made("p", 0.1, math.nan)}, reference=made("p", 0.1, 0.1)
        )
    }
    if file:
        results = json.loads(json_text(results))
    bars = attack_bars(results)
    assert len(bars) == 2
    assert all(math.isnan(bar.value) and not bar.holds for bar in bars)
    shown = {name: result | {"missing": {}} for name, result in results.items()}
    summary = {"models": {"alpha 0": {}, "reference": {}}, "attacks": shown, "bars": []}
    print_attacks(summary, Console(file=io.StringIO()))
    draw_attacks(summary, tmp_path / "attacks.png")


@pytest.mark.parametrize("name", ["alpha-0", "alpha, 0"])
def test_two_models_are_not_one_file(sources, data, tmp_path: Path, quiet, name: str) -> None:
    sources = {**sources, name: Source(sources["reference"].folder)}
    configs = attack_configs(CHEAP, "small")
    with pytest.raises(ValueError, match=f"'alpha 0' and '{name}' are both 'alpha-0' as files"):
        run_attacks(sources, LAYERS, data, configs, tmp_path / "a", quiet, {"seed": 0})
    assert not (tmp_path / "a").exists()


def test_a_killed_run_goes_on(sources, data, tmp_path: Path, quiet, monkeypatch) -> None:
    configs = attack_configs(CHEAP, "small")
    whole = run_attacks(sources, LAYERS, data, configs, tmp_path / "a", quiet, {"seed": 0})

    def killed(stage: str, done: int, total: int) -> None:
        if stage.startswith("reference: difference"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_attacks(sources, LAYERS, data, configs, tmp_path / "b", killed, {"seed": 0})
    stages: list[str] = []
    resumed = run_attacks(
        sources, LAYERS, data, configs, tmp_path / "b", lambda s, *_: stages.append(s), {"seed": 0}
    )
    assert not any(stage.startswith("alpha 0") for stage in stages)
    assert not any("membership" in s for s in stages if s.startswith("reference"))
    for name in CHEAP:
        for part in ("scores", "missing", "config"):
            assert resumed["attacks"][name][part] == whole["attacks"][name][part]
    assert resumed["bars"] == whole["bars"]
    assert json.loads((tmp_path / "b" / "attacks.json").read_text())["bars"] == whole["bars"]
    assert set(whole["versions"]) >= {"libortho", "torch", "transformers"}
    other = attack_configs(CHEAP[:1], "small")
    with pytest.raises(FileExistsError, match="another job"):
        run_attacks(sources, LAYERS, data, other, tmp_path / "a", quiet, {"seed": 0})


def test_every_attack_is_a_line_in_the_registry() -> None:
    assert set(ATTACKS) == {
        "extraction", "membership", "perturbation", "relearning", "probes", "difference"
    }  # fmt: skip
    for size in ("small", "full"):
        configs = attack_configs(list(ATTACKS), size, seed=7)
        assert all(getattr(config, "seed", 7) == 7 for config in configs.values())
    with pytest.raises(ValueError, match="size 'huge': expected small or full"):
        attack_configs(["probes"], "huge")
    with pytest.raises(ValueError, match="attack 'magic': expected one of extraction"):
        attack_configs(["magic"], "small")


def test_tables_and_picture(tmp_path: Path) -> None:
    curve = [[0, 0.1], [5, 0.4]]
    results = {
        "extraction": scores(
            **{"alpha 0": [Score("question", "recall", 0.5, 0.25, (0.4, 0.6))]},
            mine=[Score("question", "recall", 0.75), Score("cloze", "recall", 0.1)],
        )
        | {"missing": {"alpha 0": {"cloze": "none [of] them"}, "mine": {}}},
        "relearning": scores(
            **{"alpha 0": [Score("lesson", STEPS, 4.0, details={"curve": curve, "reached": True})]},
            mine=[Score("lesson", STEPS, 9.0, details={"curve": curve, "reached": False})],
        )
        | {"missing": {"alpha 0": {}, "mine": {}}},
    }
    summary = {
        "models": {"alpha 0": {}, "mine": {}},
        "attacks": results,
        "bars": [{"bar": "b", "value": 0.1, "required": "<= 0.05", "holds": False}],
    }
    console = Console(width=120, record=True, quiet=False, file=(tmp_path / "x").open("w"))
    print_attacks(summary, console)
    shown = console.export_text()
    assert "0.500 ± 0.100" in shown
    assert "4.0" in shown
    assert "> 9" in shown
    assert "falls short" in shown
    assert "extraction, cloze: none [of] them (alpha 0)" in shown
    for suffix in ("png", "svg"):
        draw_attacks(summary, tmp_path / f"p.{suffix}")
        assert (tmp_path / f"p.{suffix}").stat().st_size > 3000


def run(*arguments: object):
    return CliRunner().invoke(app, ["attack", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path, data) -> dict[str, Path]:
    made = {}
    for name in ("forget", "retain", "holdout"):
        examples = getattr(data, name)
        made[name] = tmp_path / f"{name}.jsonl"
        made[name].write_text(
            "\n".join(
                json.dumps(
                    {"question": e.question, "answer": e.answer}
                    | {"perturbed_answer": list(e.perturbed_answers)}
                )
                for e in examples
            )
        )
    return made


@pytest.fixture
def costly_ones_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--size small` makes of the attacks that generate or train."""
    monkeypatch.setattr(
        ExtractionConfig, "small",
        lambda seed: ExtractionConfig(max_new_tokens=4, samples=2, best_of=(2,), seed=seed),
    )  # fmt: skip
    monkeypatch.setattr(
        RelearningConfig, "small", lambda seed: RelearningConfig(steps=2, retain_questions=2)
    )


@pytest.mark.usefixtures("costly_ones_are_smaller")
def test_the_command(world, files, tmp_path: Path) -> None:
    """Every attack, on every model; the costly ones in a size of their own."""
    made = run(
        world.split, "--forget", files["forget"], "--retain", files["retain"],
        "--holdout", files["holdout"], "--reference", world.reference,
        "--pretrained", world.pretrained, "--beside", f"full={world.full}",
        "--out", tmp_path / "run", "--json", tmp_path / "x.json",
    )  # fmt: skip
    assert made.exit_code in (0, 3), made.output
    summary = json.loads((tmp_path / "x.json").read_text())
    assert list(summary["models"]) == ["alpha 0", "reference", "alpha 1", "full"]
    assert list(summary["attacks"]) == list(ATTACKS)
    assert len(summary["bars"]) == 8
    assert made.exit_code == (0 if all(bar["holds"] for bar in summary["bars"]) else 3)
    for result in summary["attacks"].values():
        assert set(result["scores"]) == set(summary["models"])
        assert result["scores"]["full"]
    assert (tmp_path / "run" / "attacks.png").is_file()
    assert json.loads((tmp_path / "run" / "attacks.json").read_text()) == summary
    known = {s["name"]: s for s in summary["attacks"]["extraction"]["scores"]["full"]}
    assert known["multiple choice, by likelihood"]["value"] == 1.0


def test_a_base_alone_without_a_reference(world, files, tmp_path: Path) -> None:
    from libortho.checkpoint import strip

    strip(world.split, tmp_path / "base")
    made = run(
        tmp_path / "base", "--forget", files["forget"], "--retain", files["retain"],
        "--attacks", "membership", "--out", tmp_path / "run",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    text = " ".join(made.output.split())
    assert "alpha 1 is not attacked" in text
    assert "no held-out questions were given" in text
    assert "no bars: nothing is judged without --reference" in text


@pytest.mark.usefixtures("costly_ones_are_smaller")
@pytest.mark.parametrize("texts", ["some", "all"])
def test_texts_without_a_question(world, files, data, tmp_path: Path, texts: str) -> None:
    """What asks is not tried of them, and said so; the rest is."""
    for name, file in files.items():
        examples = getattr(data, name)
        kept = [] if texts == "all" else file.read_text().splitlines()[1:]
        told = [{"text": e.answer} for e in (examples if texts == "all" else examples[:1])]
        file.write_text("\n".join([*map(json.dumps, told), *kept]))
    made = run(
        world.split, "--forget", files["forget"], "--retain", files["retain"],
        "--holdout", files["holdout"], "--pretrained", world.pretrained, "--no-original",
        "--out", tmp_path / "run", "--json", tmp_path / "x.json",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    count = "1 of 5 records has" if texts == "some" else "5 of 5 records have"
    text = " ".join(made.output.split())
    assert f"not tried extraction, {ASKING}: {count} no question (alpha 0)" in text
    assert f"not tried probes, logit lens: {count} no question (alpha 0)" in text
    assert "nothing is judged without --reference" in text
    attacks = json.loads((tmp_path / "x.json").read_text())["attacks"]
    tried = {
        name: {score["name"]: score for score in result["scores"]["alpha 0"]}
        for name, result in attacks.items()
    }
    prefix = tried["extraction"]["prefix of 50% of the answer"]["details"]
    assert prefix["questions"] == 5
    assert ("question" in tried["extraction"]) == (texts == "some")
    assert {"loss", "answer alone"} <= set(tried["membership"])
    assert ("question alone" in tried["membership"]) == (texts == "some")
    asked = len(data.forget) + len(data.holdout)
    said = "2 of 9 records have no question" if texts == "some" else f"{asked} of {asked} records"
    assert attacks["membership"]["missing"]["alpha 0"]["question alone"].startswith(said)
    assert tried["perturbation"]["unchanged"]["value"] > 0
    assert tried["relearning"]


def test_the_split_is_asked_in_its_own_form(world, files, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def note(sources, layers, data, *rest):
        asked.append(data.template)
        raise ValueError("enough")

    monkeypatch.setattr("libortho.attacks.suite.run_attacks", note)
    split = tmp_path / "split"
    shutil.copytree(world.split, split)
    report = json.loads((split / "report.json").read_text())
    report["settings"]["template"] = "chat"
    (split / "report.json").write_text(json.dumps(report))
    sets = ["--forget", files["forget"], "--retain", files["retain"], "--out", tmp_path / "run"]
    for more in ([], ["--template", "plain"]):
        assert "enough" in run(split, *sets, *more).output
    (split / "report.json").unlink()
    assert "enough" in run(split, *sets).output
    assert asked == ["chat", "plain", "plain"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--attacks", "magic"], "attack 'magic'"),
        (["--size", "huge"], "size 'huge'"),
        (["--beside", "nowhere"], "expected NAME=FOLDER"),
        (["--beside", "alpha 0=x"], "there is a model 'alpha 0' already"),
        (["--beside", "it=./no-model"], "--beside './no-model' is not there: expected the folder"),
        (["--reference", "./no-model"], "--reference './no-model' is not there: expected the"),
        (["--pretrained", "./no-model"], "--pretrained './no-model' is not there: expected the"),
        (["--template", "latin"], "expected plain or chat"),
        (["--holdout", "missing.jsonl"], "no such file"),
    ],
)
def test_bad_arguments_are_one_line(world, files, tmp_path: Path, more, told: str) -> None:
    made = run(
        world.split, "--forget", files["forget"], "--retain", files["retain"],
        "--out", tmp_path / "run", *more,
    )  # fmt: skip
    assert made.exit_code == 2, made.output
    assert told in " ".join(made.output.split())
    assert "Traceback" not in made.output
    assert not (tmp_path / "run").exists()
