"""lm-evaluation-harness on a split model: its own command, a local task, no download."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from libortho import OrthoStreamMissing, replace_linear_layers
from libortho.alpha import alpha_scope
from libortho.checkpoint import load_split, save_split, strip

lm_eval = pytest.importorskip("lm_eval")

TASK = """\
task: house
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    {"question": "where is the house ?", "choices": ["in the garden", "she wrote it"], "label": 0},
    {"question": "who wrote it ?", "choices": ["a red house", "he"], "label": 1},
    {"question": "is it red ?", "choices": ["it is", "the garden"], "label": 0},
]


@pytest.fixture
def folder(families, large_ortho, tokenizer, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model: Any = families["llama"].build()
    replace_linear_layers(model, "down_proj", scale="absmax")
    large_ortho(model)
    save_split(model, tmp_path / "split", tokenizer=tokenizer)
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "tasks" / "house.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    (tmp_path / "tasks" / "house.yaml").write_text(TASK.format(data=data))
    return tmp_path / "split"


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, text: str, answer: str) -> float:
    """Sum of log p of the answer's tokens, token by token."""
    prompt = tokenizer(text).input_ids
    ids = prompt + tokenizer(f" {answer}", add_special_tokens=False).input_ids
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(log_p[i - 1, ids[i]] for i in range(len(prompt), len(ids))))


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_likelihoods_are_those_at_alpha(folder: Path, tokenizer, alpha: float) -> None:
    import libortho.integrations.lm_eval  # noqa: F401

    found = lm_eval.simple_evaluate(
        model="libortho",
        model_args=f"pretrained={folder},alpha={alpha}",
        tasks=["house"],
        task_manager=lm_eval.tasks.TaskManager(
            include_path=str(folder.parent / "tasks"), include_defaults=False
        ),
        bootstrap_iters=0,
    )
    model = load_split(folder)
    right = 0
    for sample, question in zip(found["samples"]["house"], QUESTIONS, strict=True):
        with alpha_scope(model, alpha):
            expected = [
                likelihood(model, tokenizer, question["question"], choice)
                for choice in question["choices"]
            ]
        told = [answer[0][0] for answer in sample["resps"]]
        assert told == pytest.approx(expected, abs=1e-3)
        right += max(range(2), key=expected.__getitem__) == question["label"]
    assert found["results"]["house"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_alpha_is_checked(folder: Path, tmp_path: Path) -> None:
    from libortho.integrations.lm_eval import OrthoLM

    with pytest.raises(ValueError, match=r"alpha=2.*\[0, 1\]"):
        OrthoLM(str(tmp_path / "nowhere"), alpha=2)
    strip(folder, tmp_path / "base")
    with pytest.raises(OrthoStreamMissing):
        OrthoLM(str(tmp_path / "base"), alpha=1.0)


def test_the_command(folder: Path) -> None:
    out = folder.parent / "out"
    command = [sys.executable, "-m", "libortho.integrations.lm_eval", "run", "--model", "libortho"]
    command += ["--model_args", f"pretrained={folder},alpha=0", "--tasks", "house"]
    command += ["--include_path", str(folder.parent / "tasks")]
    command += ["--output_path", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    (written,) = out.rglob("results_*.json")
    assert set(json.loads(written.read_text())["results"]) == {"house"}
