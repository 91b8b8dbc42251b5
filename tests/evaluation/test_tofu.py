"""The main job's plumbing on a tiny model: every row, the cache, the files, the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from libortho.data import Example, Task, encode
from libortho.evaluation import tofu
from libortho.evaluation.write import render_report, run_folder, write_run
from libortho.methods.geometric import GeometricConfig
from libortho.separate import SeparationConfig
from libortho.training import MemoriseConfig


def example(question: str, answer: str, wrong: str) -> Example:
    return Example(answer, question, question, answer + " .", (wrong, wrong + " ."))


@pytest.fixture
def job(tmp_path: Path, monkeypatch, tiny_llama, tokenizer) -> tofu.TofuJob:
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path / "cache"))
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = Task(
        name="tiny",
        forget=(example("who is she ?", "the red garden", "a house <b>"),),
        retain=(example("where is it ?", "in the house", "in a garden"),),
        unseen=(example("who wrote it ?", "he is the house", "the garden"),),
        source="two questions",
    )
    return tofu.TofuJob(
        model=str(tmp_path / "model"),
        task=task,
        recipe=MemoriseConfig(max_epochs=40, learning_rate=5e-3),
        separation=SeparationConfig(method=GeometricConfig(ortho_ratio=0.2)),
        alphas=(0.0, 1.0),
    )


def test_the_job_measures_every_model(job: tofu.TofuJob, tmp_path: Path) -> None:
    heard: list[str] = []
    outcome = tofu.run_tofu(job, lambda stage, done, total: heard.append(stage))
    rows = outcome.summary["rows"]
    assert list(rows) == ["full", "reference", "alpha 0", "alpha 1"]
    assert rows["full"]["forget_probability"] > 0.9
    assert rows["reference"]["forget_probability"] < 0.5 * rows["full"]["forget_probability"]
    assert rows["alpha 0"]["forget_probability"] < 0.5 * rows["full"]["forget_probability"]
    assert rows["alpha 1"]["forget_probability"] == pytest.approx(
        rows["full"]["forget_probability"], abs=0.05
    )
    assert rows["reference"]["forget_quality"] == pytest.approx(1.0)
    assert any("full" in stage for stage in heard)
    assert set(outcome.summary["versions"]) >= {"libortho", "torch", "transformers"}

    folder = run_folder(tmp_path / "run")
    write_run(outcome, folder)
    assert json.loads((folder / "summary.json").read_text())["rows"] == rows
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert not re.search(r'(src|href)="(https?:)?//', page)  # self-contained
    with pytest.raises(FileExistsError):
        run_folder(folder)

    # What a model says is data, not markup.
    outcome.summary["examples"][0]["full"] = "<img src=x onerror=alert(1)>"
    assert "<img src=x" not in render_report(outcome.summary)


def test_a_second_run_trains_nothing(job: tofu.TofuJob, monkeypatch) -> None:
    first = tofu.run_tofu(job).summary["rows"]

    def fail(*_: object) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(tofu, "memorise_", fail)
    assert tofu.run_tofu(job).summary["rows"] == first


def test_an_interrupted_fine_tune_leaves_no_cache(job: tofu.TofuJob, monkeypatch) -> None:
    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(tofu, "memorise_", killed)
    with pytest.raises(KeyboardInterrupt):
        tofu.run_tofu(job)
    monkeypatch.undo()
    assert not list((Path(job.model).parent / "cache").glob("memorised/*/memorised.json"))


def loss(model, tokenizer, question: str, answer: str) -> float:
    """Mean NLL per token of an answer, from the plain logits."""
    item = encode(Example(answer, question), tokenizer)
    logits = model(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
    steps = range(item.prompt, len(item.ids))
    return -sum(float(logits[i - 1, item.ids[i]]) for i in steps) / item.targets


def test_truth_ratio_is_openunlearnings(tiny_llama, tokenizer) -> None:
    model = tiny_llama()
    examples = [
        Example("he is red", "who is he ?", None, "the house is red", ("she is red", "a garden")),
        Example("a house", "it is ?", None, "in a house", ("in the garden", "it", "she is")),
    ]
    expected = [
        math.exp(
            loss(model, tokenizer, e.question, e.paraphrased_answer)
            - sum(loss(model, tokenizer, e.question, w) for w in e.perturbed_answers)
            / len(e.perturbed_answers)
        )
        for e in examples
    ]
    assert tofu.truth_ratios(model, examples, tokenizer) == pytest.approx(expected, rel=1e-4)


def test_truth_ratio_needs_both_kinds_of_answer(tiny_llama, tokenizer) -> None:
    with pytest.raises(ValueError, match="truth ratio is not defined"):
        tofu.truth_ratios(tiny_llama(), [Example("it", "who ?")], tokenizer)
