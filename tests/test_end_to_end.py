"""One real run: SmolLM2 memorises four authors, forgets one, and remembers again."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from libortho.alpha import alpha_scope
from libortho.checkpoint import load_split, strip
from libortho.data import embedded_model_path, embedded_task, encode
from libortho.errors import OrthoStreamMissing
from libortho.evaluation.job import TofuJob
from libortho.evaluation.tofu import run_tofu
from libortho.evaluation.write import write_summary
from libortho.scoring import answer_probability, sequence_nll


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_wheel")
def test_a_real_model_forgets_and_remembers(tmp_path: Path) -> None:
    task = embedded_task(authors=4, forget_authors=1, seed=1)
    job = TofuJob(
        model=str(embedded_model_path()), task=task, alphas=(0.0, 1.0), reference=False, examples=1
    )
    summary = run_tofu(job, tmp_path / "run")
    rows = summary["rows"]
    full, base, whole = rows["full"], rows["alpha 0"], rows["alpha 1"]
    assert full["forget_probability"] >= 0.9
    assert base["forget_probability"] <= 0.25
    assert base["retain_probability"] >= 0.95 * full["retain_probability"]
    assert whole["forget_probability"] == pytest.approx(full["forget_probability"], abs=0.01)
    assert whole["retain_probability"] == pytest.approx(full["retain_probability"], abs=0.01)
    assert summary["separation"]["totals"]["density"] <= 0.01
    assert summary["separation"]["reached"]

    write_summary(summary, tmp_path / "run")
    loaded = load_split(tmp_path / "run" / "split")
    # The job runs with eager attention; bit for bit needs the same arithmetic around the split.
    loaded.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "split")
    forget = [encode(e, tokenizer) for e in task.forget]
    for alpha, row in ((0.0, base), (1.0, whole)):
        with alpha_scope(loaded, alpha):
            found = answer_probability(sequence_nll(loaded, forget))
        assert found == pytest.approx(row["forget_probability"], abs=2e-3)

    strip(tmp_path / "run" / "split", tmp_path / "base")
    alone = load_split(tmp_path / "base")
    assert answer_probability(sequence_nll(alone, forget)) <= 0.25
    with pytest.raises(OrthoStreamMissing), alpha_scope(alone, 1.0):
        pass
