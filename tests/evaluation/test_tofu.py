"""The job's plumbing on a tiny model: every row, the cache, the files, the page, going on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from pathlib import Path
from typing import Any

import pytest

from libortho import training
from libortho.baselines.registry import baseline
from libortho.baselines.tune import TuneConfig
from libortho.checkpoint import load_split
from libortho.data import Example, Task
from libortho.evaluation import finetuned, measuring, seed
from libortho.evaluation.folder import JobFolder
from libortho.evaluation.job import TofuJob, identity
from libortho.evaluation.suite import Evaluation, SuiteConfig
from libortho.evaluation.tofu import run_tofu
from libortho.evaluation.write import render_report, write_summary
from libortho.methods.geometric import GeometricConfig
from libortho.methods.graft import GraftConfig
from libortho.methods.saliency import SaliencyConfig
from libortho.separate import SeparationConfig
from libortho.training import MemoriseConfig


def example(question: str, answer: str, wrong: str) -> Example:
    return Example(answer, question, question, answer + " .", (wrong, wrong + " ."))


@pytest.fixture
def job(tmp_path: Path, monkeypatch, tiny_llama, tokenizer) -> TofuJob:
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path / "cache"))
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = Task(
        name="tiny",
        forget=(example("who is she ?", "the red garden", "a house <b>"),),
        retain=(example("where is it ?", "in the house", "in a garden"),),
        unseen=(example("who wrote it ?", "he is the house", "the garden"),),
        source="two questions",
        holdout=(example("what is it ?", "she is a garden", "the house"),),
    )
    return TofuJob(
        model=str(tmp_path / "model"),
        task=task,
        recipe=MemoriseConfig(max_epochs=40, learning_rate=5e-3),
        methods={"geometric": SeparationConfig(method=GeometricConfig(ortho_ratio=0.2))},
        alphas=(0.0, 1.0),
    )


def test_the_job_measures_every_model(job: TofuJob, tmp_path: Path) -> None:
    heard: list[str] = []
    folder = tmp_path / "run"
    summary = run_tofu(job, folder, lambda stage, done, total: heard.append(stage))
    rows = summary["rows"]
    assert list(rows) == ["full", "reference", "alpha 0", "alpha 1"]
    assert rows["full"]["forget_probability"] > 0.9
    assert rows["reference"]["forget_probability"] < 0.5 * rows["full"]["forget_probability"]
    assert rows["alpha 0"]["forget_probability"] < 0.5 * rows["full"]["forget_probability"]
    assert rows["alpha 1"]["forget_probability"] == pytest.approx(
        rows["full"]["forget_probability"], abs=0.05
    )
    assert rows["reference"]["forget_quality"] == pytest.approx(1.0)
    assert (
        summary["seeds"]["0"]["missing"]["full"]["model_utility"] == "not part of the quick suite"
    )
    assert any("full" in stage for stage in heard)
    assert set(summary["versions"]) >= {"libortho", "torch", "transformers"}
    assert set(summary["examples"][0]) == {"question", "truth", *rows}
    assert {bar["bar"] for bar in summary["bars"]} >= {"full model: forget probability"}
    load_split(folder / "split")
    # What it rehearsed itself, to cache it, is wanted as what `separate_` would have rehearsed.
    assert summary["separation"]["settings"]["earlier"] == "rehearsed"
    assert summary["separation"]["settings"]["template"] == job.template

    write_summary(summary, folder)
    assert json.loads((folder / "summary.json").read_text())["rows"] == rows
    page = (folder / "report.html").read_text()
    drawn = sorted(file.stem for file in folder.glob("*.png"))
    assert drawn == [
        "alpha_sweep",
        "forget_energy",
        "forgetting_against_utility",
        "ortho_per_layer",
        "truth_ratios",
    ]
    assert page.count("<svg") == len(drawn)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(https?:)?//', page)  # self-contained

    # What a model says is data, not markup.
    summary["examples"][0]["full"] = "<img src=x onerror=alert(1)>"
    assert "<img src=x" not in render_report(summary, [])


def test_the_distance_to_the_full_model_is_over_all_of_both_sets(
    job: TofuJob, tmp_path: Path, monkeypatch
) -> None:
    told: list[list[Any]] = []
    monkeypatch.setattr(measuring, "KL_SEQUENCES", 4)
    monkeypatch.setattr(measuring, "evaluate_suite", lambda *_, **__: Evaluation({}, {}, {}))
    monkeypatch.setattr(measuring, "load_model", lambda *_: None)
    monkeypatch.setattr(
        measuring, "mean_token_kl", lambda full, model, items: told.append(items) or 0.0
    )
    job = dataclasses.replace(job, suite=SuiteConfig())
    store = JobFolder(tmp_path / "run", identity(job))
    sets = [list(range(40)), list(range(100, 110))]
    measured = measuring.Measurements(job, 0, store, None, *sets, lambda *_: None)
    full = types.SimpleNamespace(load=lambda: None)
    measured.measure("alpha 1", lambda: None, full=full)
    (items,) = told
    forget, retain = items[:4], items[4:]
    assert forget[-1] >= 30
    assert retain[-1] >= 107
    assert len(retain) == 4


def test_what_the_full_model_knows_best_is_shown_first(job: TofuJob, tmp_path: Path) -> None:
    more = [example(f"who is {who} ?", f"the {who} house", "a garden") for who in ("he", "red")]
    task = dataclasses.replace(job.task, forget=(*job.task.forget, *more))
    job = dataclasses.replace(job, task=task, reference=False)
    examples = run_tofu(job, tmp_path / "run")["examples"]
    logs = JobFolder(tmp_path / "run", identity(job)).evaluation(0, "full").logs
    known = logs["forget_Q_A_Prob"]["value_by_index"]
    by_question = {e.question: known[str(i)]["prob"] for i, e in enumerate(task.forget)}
    assert len(set(by_question.values())) == 3
    surest = sorted(by_question, key=by_question.get, reverse=True)
    assert [shown["question"] for shown in examples] == surest


def test_results_are_in_openunlearnings_files(job: TofuJob, tmp_path: Path) -> None:
    rows = run_tofu(job, tmp_path / "run")["rows"]
    for row in rows:
        folder = tmp_path / "run" / "seed-0" / row.replace(" ", "-")
        logs = json.loads((folder / "TOFU_EVAL.json").read_text())
        assert logs["forget_Q_A_Prob"]["agg_value"] == rows[row]["forget_probability"]
        assert set(logs["forget_Q_A_Prob"]["value_by_index"]["0"]) == {"prob", "avg_loss"}
        short = json.loads((folder / "TOFU_SUMMARY.json").read_text())
        assert short["forget_quality"] == rows[row]["forget_quality"]


def test_a_second_run_trains_nothing(job: TofuJob, tmp_path: Path, monkeypatch) -> None:
    first = run_tofu(job, tmp_path / "one")["rows"]

    def fail(*_: object) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(finetuned, "memorise_", fail)
    second = run_tofu(job, tmp_path / "two")["rows"]
    for row, values in first.items():
        for measure, value in values.items():
            if measure not in ("seconds", "peak_memory"):
                assert second[row][measure] == value, (row, measure)


def test_what_another_job_compared_is_not_in_the_cache(job: TofuJob, tmp_path: Path) -> None:
    """A job that goes on has compared its models already; who takes them from the cache has not."""
    for _ in range(2):
        run_tofu(job, tmp_path / "one")
    alone = run_tofu(dataclasses.replace(job, reference=False), tmp_path / "two")
    assert "forget_quality" not in alone["rows"]["full"]
    assert "forget_quality" in alone["seeds"]["0"]["missing"]["full"]


def test_an_interrupted_fine_tune_leaves_no_cache(
    job: TofuJob, tmp_path: Path, monkeypatch
) -> None:
    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuned, "memorise_", killed)
    with pytest.raises(KeyboardInterrupt):
        run_tofu(job, tmp_path / "run")
    monkeypatch.undo()
    assert not list((Path(job.model).parent / "cache").glob("memorised/*/memorised.json"))


def test_a_killed_job_goes_on_where_it_was(job: TofuJob, tmp_path: Path, monkeypatch) -> None:
    """Killed while alpha 1 is measured: nothing before that is done again, and rows are equal."""
    whole = run_tofu(job, tmp_path / "whole")

    def killed_at_alpha_one(stage: str, done: int, total: int) -> None:
        if stage.startswith("alpha 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tofu(job, tmp_path / "run", killed_at_alpha_one)

    def fail(*_: object, **__: object) -> Any:
        raise AssertionError("split again")

    monkeypatch.setattr(seed, "separate_", fail)
    stages: list[str] = []
    resumed = run_tofu(job, tmp_path / "run", lambda stage, *_: stages.append(stage))
    assert {stage.split(":")[0] for stage in stages} == {"alpha 1"}
    for row, values in whole["rows"].items():
        for measure, value in values.items():
            if measure not in ("seconds", "peak_memory"):
                assert resumed["rows"][row][measure] == value, (row, measure)


def test_a_killed_baseline_goes_on_where_it_was(job: TofuJob, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    # So small a rate that no epoch reaches the level: every one of them is run.
    tuning = TuneConfig(learning_rate_factors=(1e-6,), max_epochs=3)
    methods = {**job.methods, "npo": baseline("npo")}
    job = dataclasses.replace(job, methods=methods, tuning=tuning, suite=SuiteConfig(quick=True))
    whole = run_tofu(job, tmp_path / "whole")["rows"]["npo"]

    def killed_in_epoch_three(stage: str, done: int, total: int) -> None:
        if "epoch 3" in stage and stage.startswith("npo"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tofu(job, tmp_path / "run", killed_in_epoch_three)
    states = tmp_path / "run" / "seed-0" / "npo" / "states"
    assert [file.name for file in states.iterdir()] == ["run-1"]
    stages: list[str] = []
    resumed = run_tofu(job, tmp_path / "run", lambda stage, *_: stages.append(stage))
    trained = [stage for stage in stages if "epoch" in stage]
    assert trained
    assert all("epoch 3" in stage for stage in trained)
    assert not states.exists()
    for measure, value in whole.items():
        if measure not in ("seconds", "peak_memory"):
            assert resumed["rows"]["npo"][measure] == value, measure


def test_both_ends_of_alpha_are_measured(job: TofuJob) -> None:
    with pytest.raises(ValueError, match=r"alphas=\(0.0,\): expected 0 and 1"):
        dataclasses.replace(job, alphas=(0.0,))


def test_another_jobs_folder_is_refused(
    job: TofuJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tofu(job, tmp_path / "run")
    with pytest.raises(FileExistsError, match="another job"):
        run_tofu(dataclasses.replace(job, alphas=(0.0, 0.5, 1.0)), tmp_path / "run")
    monkeypatch.setattr("libortho.evaluation.job.MEASURED_FORMAT", 1000)
    with pytest.raises(FileExistsError, match="of another version"):
        run_tofu(job, tmp_path / "run")
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        run_tofu(job, tmp_path / "mine")


def test_another_model_in_its_place_is_another_job(
    job: TofuJob, tmp_path: Path, tiny_llama
) -> None:
    JobFolder(tmp_path / "run", identity(job))
    JobFolder(tmp_path / "run", identity(job))  # the same goes on
    tiny_llama(hidden_size=64).save_pretrained(job.model)
    with pytest.raises(FileExistsError, match="another job"):
        JobFolder(tmp_path / "run", identity(job))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ortho.safetensors.enc"])
def test_weights_are_told_in_every_form(tmp_path: Path, name: str) -> None:
    """Or a fine-tune of the weights that were there before would be taken from the cache."""
    found = []
    for content in (b"weights", b"other weights"):
        (tmp_path / name).write_bytes(content)
        found.append(finetuned.model_identity(str(tmp_path)))
    assert found[0] != found[1]


def test_another_main_method_is_another_job(job: TofuJob, tmp_path: Path) -> None:
    """Or what was measured of the one, "alpha 0", would be shown as the other's."""
    methods = {**job.methods, "saliency": SeparationConfig(method=SaliencyConfig())}
    JobFolder(tmp_path / "run", identity(dataclasses.replace(job, methods=methods)))
    swapped = dict(reversed(methods.items()))
    with pytest.raises(FileExistsError, match="another job"):
        JobFolder(tmp_path / "run", identity(dataclasses.replace(job, methods=swapped)))


def test_methods_seeds_and_baselines_in_one_table(job: TofuJob, tmp_path: Path) -> None:
    knowledge = (example("where is the garden ?", "the red house", "a garden"),)
    task = dataclasses.replace(job.task, real_authors=knowledge, world_facts=knowledge)
    job = dataclasses.replace(
        job,
        task=task,
        methods={**job.methods, "npo": baseline("npo")},
        suite=SuiteConfig(max_new_tokens=4),
        tuning=TuneConfig(learning_rate_factors=(1.0,), max_epochs=2),
        seeds=(0, 1),
    )
    summary = run_tofu(job, tmp_path / "run")
    assert list(summary["rows"]) == ["full", "reference", "alpha 0", "alpha 1", "npo"]
    assert set(summary["seeds"]) == {"0", "1"}
    for row in summary["rows"]:
        values = [summary["seeds"][s]["rows"][row]["model_utility"] for s in ("0", "1")]
        assert summary["rows"][row]["model_utility"] == pytest.approx(sum(values) / 2)
    assert len(summary["seeds"]["0"]["tuning"]["npo"]["candidates"]) == 1
    assert {"seconds", "peak_memory", "stopped"} <= set(summary["rows"]["npo"])
    bars = {bar["bar"]: bar for bar in summary["bars"]}
    assert any("baselines beaten" in bar for bar in bars)
    assert any("mean token KL" in bar for bar in bars)
    write_summary(summary, tmp_path / "run")


def test_the_base_of_a_graft_is_trained_apart_from_the_reference(
    job: TofuJob, tmp_path: Path, monkeypatch
) -> None:
    graft = GraftConfig(ortho_ratio=0.4, epochs=40, training=job.recipe)
    job = dataclasses.replace(job, methods={"graft": SeparationConfig(method=graft), **job.methods})
    trained: list[tuple[int, int]] = []
    original = seed.fine_tuned

    def noted(model, items, recipe, label, tell):
        trained.append((len(items), recipe.seed))
        return original(model, items, recipe, label, tell)

    monkeypatch.setattr(seed, "fine_tuned", noted)
    summary = run_tofu(job, tmp_path / "run")
    # full, reference, the graft's base, and what geometric's earlier model is rehearsed on
    assert trained == [(2, 0), (1, 0), (1, seed.BASE_SEED), (1, 0)]
    settings = summary["separation"]["settings"]
    assert settings["method"]["training"]["seed"] == seed.BASE_SEED
    assert settings["method"]["seed"] == 0
    rows = summary["rows"]
    assert list(rows)[2:] == [
        "alpha 0", "alpha 1", "geometric, alpha 0", "geometric, alpha 1",
    ]  # fmt: skip
    assert rows["alpha 0"]["forget_probability"] < 0.5 * rows["full"]["forget_probability"]
    assert rows["alpha 1"]["forget_probability"] > 0.9 * rows["full"]["forget_probability"]


def test_seconds_that_are_not_known_are_not_zero(job: TofuJob, tmp_path: Path, monkeypatch) -> None:
    """Of an interrupted rehearsal: the split would look faster than it is."""
    original = seed.fine_tuned

    def interrupted(*arguments: Any) -> finetuned.FineTuned:
        made = original(*arguments)
        return dataclasses.replace(made, seconds=None) if "rehearsal" in arguments else made

    monkeypatch.setattr(seed, "fine_tuned", interrupted)
    for _ in range(2):  # the second time, from the files
        summary = run_tofu(job, tmp_path / "run")
        assert math.isnan(summary["rows"]["alpha 0"]["seconds"])
        write_summary(summary, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"npo": baseline("npo")}}, "first method is npo"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (1, 0, 1)}, r"seeds=\(1, 0, 1\): expected each value once"),
        *(
            ({"methods": {"geometric": SeparationConfig(), name: baseline("npo")}}, "as files")
            for name in ("reference", "alpha 0")
        ),
        (
            {"methods": {"my method": SeparationConfig(), "my-method": baseline("npo")}},
            "'my-method' as files",
        ),
    ],
)
def test_a_job_that_cannot_be(job: TofuJob, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(job, **change)


def test_questions_without_perturbed_answers_have_no_truth_ratio(
    job: TofuJob, tmp_path: Path
) -> None:
    bare = tuple(Example(e.answer, e.question) for e in job.task.forget)
    job = dataclasses.replace(job, task=dataclasses.replace(job.task, forget=bare))
    summary = run_tofu(job, tmp_path / "run")
    assert "forget_truth_ratio" in summary["seeds"]["0"]["missing"]["alpha 0"]
    assert not {"truth_ratio", "truth_ratios", "forget_quality"} & set(summary["rows"]["alpha 0"])
    write_summary(summary, tmp_path / "run")


def test_what_was_not_measured_does_not_hold(job: TofuJob, tmp_path: Path) -> None:
    """The full suite of a task without general knowledge has no model utility."""
    job = dataclasses.replace(job, suite=SuiteConfig(max_new_tokens=4))
    summary = run_tofu(job, tmp_path / "run")
    assert "model_utility" in summary["seeds"]["0"]["missing"]["alpha 0"]
    (bar,) = (bar for bar in summary["bars"] if bar["bar"].startswith("model utility"))
    assert bar["value"] != bar["value"]
    assert not bar["holds"]
    write_summary(summary, tmp_path / "run")
