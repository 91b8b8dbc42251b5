"""Can what the demo forgets be got back? Every attack on its split, beside the retrained model.

    python benchmarks/attacks.py [--size small|full] [--attacks extraction,...] [--out DIR]
        [--methods geometric,graft] [--baselines npo,...] [--data TOFU_FOLDER] [--json FILE]

The splits are made as `libortho tofu --methods geometric,graft` makes them: of the embedded model,
ten embedded authors, two to forget, or with --data of TOFU's first two forget authors and ten
retain authors. Baselines are tuned to the level that the first split reached, as there. Fine-tunes
are cached; the splits, the baselines and each attack on each model are kept in --out, and a run
that was killed goes on where it was. The bars are those of `libortho.attacks.suite`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from libortho.attacks.common import AttackData
from libortho.attacks.registry import ATTACKS, attack_configs
from libortho.attacks.show import draw_attacks, print_attacks
from libortho.attacks.suite import BASE, ORIGINAL, REFERENCE, Source, run_attacks
from libortho.baselines.registry import Baseline, baseline
from libortho.baselines.tune import TuneConfig, tune
from libortho.checkpoint import read_manifest, save_split
from libortho.cli.console import progress_bars, write_json
from libortho.cli.options import method_config
from libortho.data.embedded import embedded_model_path
from libortho.data.tasks import embedded_task, tofu_task
from libortho.data.tokens import encode
from libortho.evaluation.finetuned import fine_tuned, load_model
from libortho.evaluation.folder import JobFolder
from libortho.evaluation.job import identity, seeded
from libortho.evaluation.tofu import TofuJob, run_tofu
from libortho.files import cache_dir, replacing
from libortho.separate import SeparationConfig
from libortho.training import Progress

BASELINE_EPOCHS = 5
"""Of each learning rate, as in docs/results.md."""


class Models:
    """The job's models, made now or found where they were made.

    Attributes:
        splits: method -> folder.
        reference: folder of the retrain reference, which never saw the forget set.
    """

    def __init__(self, job: TofuJob, folder: Path, progress: Progress) -> None:
        self._folder, self._job, self._tell = folder, job, progress
        self._seed = job.seeds[0]
        run_tofu(job, folder / "job", progress)
        store = JobFolder(folder / "job", identity(job))
        self.splits = {
            name: store.split(self._seed, name, main=name == job.main) for name in job.methods
        }
        self._level = float(report_of(self.splits[job.main])["target"]["reached_probability"])
        self._tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
        self._retain, self._forget = (
            [encode(e, self._tokenizer, job.template) for e in part]
            for part in (job.task.retain, job.task.forget)
        )
        recipe = dataclasses.replace(job.recipe, seed=self._seed)
        everything = [*self._retain, *self._forget]
        self._full = fine_tuned(job.model, everything, recipe, "full", progress)
        alike = dataclasses.replace(recipe, target=1.0, max_epochs=self._full.epochs)
        self.reference = fine_tuned(job.model, self._retain, alike, "reference", progress).folder

    def baseline(self, name: str) -> Path:
        """The folder of the full model after a baseline, tuned to the level of the split."""
        config = seeded(baseline(name), self._seed)
        tuning = TuneConfig(max_epochs=BASELINE_EPOCHS)
        made = self._folder / baseline_folder(name, self._job, config, tuning, self._level)
        if not made.is_dir():
            outcome = tune(
                self._full.load,
                self._forget,
                self._retain,
                config,
                self._level,
                tuning,
                lambda stage, done, total: self._tell(f"{name}: {stage}", done, total),
            )
            if outcome.report is not None:
                save_split(outcome.model, made, tokenizer=self._tokenizer, report=outcome.report)
                return made
            with replacing(made, folder=True) as partial:
                outcome.model.save_pretrained(partial)
                self._tokenizer.save_pretrained(partial)
        return made


def baseline_folder(
    name: str, job: TofuJob, config: Baseline, tuning: TuneConfig, level: float
) -> str:
    """What to call a baseline's folder: another name for whatever makes another model."""
    described = [
        identity(job), type(config).__name__, dataclasses.asdict(config),
        dataclasses.asdict(tuning), level,
    ]  # fmt: skip
    text = json.dumps(described, sort_keys=True, default=str)
    return f"baseline-{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def report_of(split: Path) -> dict[str, Any]:
    """What `report.json` in a split says."""
    found: dict[str, Any] = json.loads((split / "report.json").read_text("utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="small or full")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which, with commas")
    parser.add_argument(
        "--methods", default="geometric,graft", help="that split, with commas; all are attacked"
    )
    parser.add_argument("--baselines", default="npo", help="attacked as well, with commas")
    parser.add_argument("--data", help="a folder in TOFU's layout; default: the embedded authors")
    parser.add_argument("--out", type=Path, help="default: a folder in the cache")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    seed = arguments.seed
    task = tofu_task(arguments.data) if arguments.data else embedded_task(seed=seed)
    model = str(embedded_model_path())
    methods = {
        name: SeparationConfig(method=method_config(name, 0.01, seed, "int8"))
        for name in arguments.methods.split(",")
    }
    job = TofuJob(model=model, task=task, methods=methods, alphas=(0.0, 1.0), seeds=(seed,))
    out = arguments.out or cache_dir() / "attacked" / f"{task.name}-seed-{seed}"
    configs = attack_configs(arguments.attacks.split(","), arguments.size, seed)
    with progress_bars() as progress:
        models = Models(job, out, progress)
        split = models.splits[job.main]
        sources = {
            BASE: Source(str(split)),
            REFERENCE: Source(str(models.reference)),
            ORIGINAL: Source(str(split), alpha=1.0),
        }
        others = {f"{name}, {BASE}": models.splits[name] for name in [*methods][1:]}
        sources |= {who: Source(str(folder)) for who, folder in others.items()}
        for name in filter(None, arguments.baselines.split(",")):
            sources[name] = Source(str(models.baseline(name)))
        data = AttackData(
            tokenizer=AutoTokenizer.from_pretrained(split, trust_remote_code=False),
            forget=task.forget,
            retain=task.retain,
            holdout=task.holdout,
            template=job.template,
            pretrained=load_model(model),
        )
        folder = out / f"attacks-{arguments.size}-{'-'.join(configs)}"
        layers = tuple(read_manifest(split).layers)
        told = {"task": task.source, "size": arguments.size, "seed": seed, "pretrained": model}
        judged = (BASE, *others)
        summary = run_attacks(sources, layers, data, configs, folder, progress, told, judged)
    draw_attacks(summary, folder / "attacks.png")
    # What is kept of it names no place of the machine that it ran on.
    named = {
        who: one | {"folder": Path(one["folder"]).name} for who, one in summary["models"].items()
    }
    write_json(arguments.json, summary | {"models": named, "pretrained": Path(model).name})
    print_attacks(summary, Console())
    print(f"\nresults  {folder / 'attacks.json'}\npicture  {folder / 'attacks.png'}")


if __name__ == "__main__":
    main()
