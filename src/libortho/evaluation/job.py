"""What a TOFU job is: what is memorised and forgotten, by which methods, and what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import libortho
from libortho.baselines.registry import Baseline
from libortho.baselines.tune import TuneConfig
from libortho.data.tasks import Task
from libortho.data.tokens import Template
from libortho.evaluation.finetuned import CACHE_FORMAT, model_identity
from libortho.evaluation.folder import slug
from libortho.evaluation.suite import MEASURED_FORMAT, SuiteConfig
from libortho.separate import SeparationConfig
from libortho.training import MemoriseConfig


@dataclass(frozen=True)
class TofuJob:
    """One run of the job.

    Attributes:
        model: a local folder or a Hugging Face name of a causal LM.
        task: what is memorised and forgotten.
        methods: name -> how to split, or which baseline to run; the first is the main method, whose
            rows are called "alpha 0" and so on, and which the bars are about.
        recipe: of the fine-tunes.
        suite: what is measured of each model.
        alphas: where splits are measured; 0 and 1, which all bars are about, are among them.
        template: how questions become prompts.
        reference: also fine-tune the reference.
        seeds: the whole is done once for each: order of the training data, randomness of methods.
        tuning: budget of each baseline.
        wikitext: running text for perplexity, or None.
        examples: questions whose answers are shown.
    """

    model: str
    task: Task
    methods: Mapping[str, SeparationConfig | Baseline] = field(
        default_factory=lambda: {"geometric": SeparationConfig()}
    )
    recipe: MemoriseConfig = field(default_factory=MemoriseConfig)
    suite: SuiteConfig = field(default_factory=lambda: SuiteConfig(quick=True))
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    template: Template = "plain"
    reference: bool = True
    seeds: tuple[int, ...] = (0,)
    tuning: TuneConfig = field(default_factory=TuneConfig)
    wikitext: str | None = None
    examples: int = 6

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty: expected at least one")
        if not isinstance(next(iter(self.methods.values())), SeparationConfig):
            raise ValueError(
                f"the first method is {next(iter(self.methods))}: expected one that splits, "
                "for the table to have an alpha; baselines come after it"
            )
        taken = {"full", "reference"}
        for file in map(slug, self.methods):
            # What was measured of one model must not be shown as another's.
            if file in taken or file.startswith("alpha-"):
                raise ValueError(
                    f"two models are {file!r} as files: expected methods of other names than full, "
                    "reference and alpha, that differ in more than spaces and hyphens"
                )
            taken.add(file)
        if not {0.0, 1.0} <= set(self.alphas):
            raise ValueError(
                f"alphas={self.alphas!r}: expected 0 and 1 among them, the two ends that a split "
                "is judged at"
            )
        if not self.seeds:
            raise ValueError("seeds is empty: expected at least one")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds!r}: expected each value once")

    @property
    def main(self) -> str:
        """The main method."""
        return next(iter(self.methods))

    @property
    def baselines(self) -> list[str]:
        return [n for n, m in self.methods.items() if not isinstance(m, SeparationConfig)]


def identity(job: TofuJob) -> dict[str, Any]:
    """What must be equal for a job to go on in a folder: all that its results depend on."""
    return {
        "libortho": libortho.__version__,
        "formats": [CACHE_FORMAT, MEASURED_FORMAT],
        "model": job.model,
        "files": model_identity(job.model),  # a path stays when another model is put there
        "task": dataclasses.asdict(job.task),
        "main": job.main,  # whose rows are called "alpha 0" and so on: the order of methods counts
        "methods": {
            name: [type(method).__name__, dataclasses.asdict(method)]
            for name, method in job.methods.items()
        },
        "recipe": dataclasses.asdict(job.recipe),
        "suite": dataclasses.asdict(job.suite),
        "alphas": job.alphas,
        "template": job.template,
        "reference": job.reference,
        "seeds": job.seeds,
        "tuning": dataclasses.asdict(job.tuning),
        "wikitext": job.wikitext,
        "examples": job.examples,
    }


def seeded(method: Any, seed: int) -> Any:
    """A method's config with the job's seed, wherever it keeps one."""
    changes: dict[str, Any] = {}
    for part in dataclasses.fields(method):
        value = getattr(method, part.name)
        if part.name == "seed":
            changes["seed"] = seed
        elif part.name in ("method", "training", "rehearsal", "objective"):
            changes[part.name] = seeded(value, seed)
    return dataclasses.replace(method, **changes)
