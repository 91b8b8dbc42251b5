"""`libortho tofu`: what its options make of the job."""

from __future__ import annotations

import pytest
from commands import run

from libortho.baselines.lora_null import LoraNullConfig
from libortho.evaluation.job import TofuJob


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
