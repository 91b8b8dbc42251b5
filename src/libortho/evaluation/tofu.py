"""The TOFU job: fine-tune, split or unlearn by every method asked for, and measure all alike.

    full         fine-tuned on all authors
    reference    fine-tuned, by the same recipe, without the authors to be forgotten
    a split      the full model, separated; measured at several alphas
    a baseline   the full model, unlearned by gradient steps to the same level; measured once

Fine-tunes are cached. Splits and measurements are files in the job's folder, and a job that is
started again with that folder goes on where it was.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import libortho
from libortho.checkpoint.sealed import sealing_key
from libortho.evaluation.bars import Bar, benchmark_bars, demo_bars, over_seeds
from libortho.evaluation.folder import JobFolder
from libortho.evaluation.job import TofuJob, identity
from libortho.evaluation.rows import median_row
from libortho.evaluation.seed import SeedRun
from libortho.training import Progress


def run_tofu(job: TofuJob, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the job; see the module's text.

    Args:
        job: what to do.
        folder: for splits and measurements; empty, or that of an interrupted run of the same job.
        progress: called as work goes on.

    Returns:
        The summary, JSON-ready; the report is drawn from it alone.

    Raises:
        FileExistsError: `folder` holds something else.
        ValueError, OSError: as `separate_` and the loading of models do, or of the key that splits
            are to be encrypted with (`ortho_access`).
    """
    tell = progress or (lambda stage, done, total: None)
    started = time.perf_counter()
    sealing_key()  # what saving would raise of it, before hours of work
    store = JobFolder(folder, identity(job))
    tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    seeds = {}
    for seed in job.seeds:
        label = "" if len(job.seeds) == 1 else f"seed {seed}: "

        def labelled(stage: str, done: int, total: int, label: str = label) -> None:
            tell(label + stage, done, total)

        seeds[seed] = SeedRun(job, seed, store, tokenizer, labelled).run()
    first = seeds[job.seeds[0]]
    tables = [done.measured.rows for done in seeds.values()]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    rows = {name: median_row([table[name] for table in tables]) for name in names}
    bars = {seed: _bars(job, done) for seed, done in seeds.items()}
    return {
        "task": {
            "name": job.task.name,
            "source": job.task.source,
            "forget": len(job.task.forget),
            "retain": len(job.task.retain),
        },
        "model": job.model,
        "methods": {
            name: dataclasses.asdict(method) | {"kind": type(method).__name__}
            for name, method in job.methods.items()
        },
        "rows": rows,
        "bars": [bar.to_dict() for bar in over_seeds(list(bars.values()))],
        "seeds": {
            str(seed): {
                "rows": done.measured.rows,
                "bars": [bar.to_dict() for bar in bars[seed]],
                "missing": {row: e.missing for row, e in done.measured.evaluations.items()},
                "tuning": done.tuning,
                "reached": done.separation["reached"],
            }
            for seed, done in seeds.items()
        },
        "examples": first.measured.examples(),
        "separation": first.separation,
        "recipe": {**dataclasses.asdict(job.recipe), **first.recipe},
        "suite": dataclasses.asdict(job.suite),
        "seconds": {**first.seconds, "total": time.perf_counter() - started},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What a result was measured with."""
    return {
        "libortho": libortho.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _bars(job: TofuJob, done: SeedRun) -> list[Bar]:
    rows, density = done.measured.rows, float(done.separation["totals"]["density"])
    if job.suite.quick:
        return demo_bars(rows, density)
    return benchmark_bars(rows, density, job.baselines)
