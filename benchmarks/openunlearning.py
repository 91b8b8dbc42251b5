"""Do the suite's metrics agree with OpenUnlearning's own code?

    git clone https://github.com/locuslab/open-unlearning
    libortho tofu --data DIR --authors 12 --forget-authors 2   # fine-tunes both models
    python benchmarks/openunlearning.py --open-unlearning open-unlearning --data DIR \\
        --model FULL --reference REFERENCE --tokenizer MODEL [--questions 20] [--json FILE]

Both sides measure the same model object in fp32, on the same token sequences: OpenUnlearning's
evaluator runs as it is, with its own configuration, metrics and collator, and only its data sets
are replaced, by ours in its format (its own would tokenise by a template of theirs). Every number
of its TOFU_EVAL.json is then compared with ours, the aggregates and each question's; exit status 1
if one of either differs by more than 1e-3, absolute for values up to 1 and relative above, or is
not there. Beside LibOrtho's own requirements it needs omegaconf, hydra-core, datasets and
scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from libortho.cli.console import write_json
from libortho.data import Example, encode, tofu_task
from libortho.data.tokens import Tokens
from libortho.evaluation.compare import with_reference
from libortho.evaluation.entries import write_openunlearning
from libortho.evaluation.suite import SuiteConfig, evaluate_suite
from libortho.evaluation.suite_data import SuiteData
from libortho.evaluation.tofu import versions

TOLERANCE = 1e-3
EXTRA_METRICS = ("exact_memorization", "mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
"""What OpenUnlearning's tofu.yaml leaves commented out."""
REFERENCE_METRICS = ("forget_truth_ratio", "mia_min_k")
"""What is read of the reference model's logs."""
PACKAGES = ("datasets", "hydra-core", "nltk", "numpy", "omegaconf", "rouge-score", "scikit-learn")

# Its name for a data set: which of our sets, and which answers of it.
DATASETS = {
    "TOFU_QA_forget": ("forget", "answer"),
    "TOFU_QA_forget_para": ("forget", "paraphrased"),
    "TOFU_QA_forget_pert": ("forget", "perturbed"),
    "TOFU_QA_holdout": ("holdout", "answer"),
    "TOFU_QA_retain_eval": ("retain", "answer"),
    "TOFU_QA_retain_para": ("retain", "paraphrased"),
    "TOFU_QA_retain_pert": ("retain", "perturbed"),
    "TOFU_QA_ra": ("real_authors", "answer"),
    "TOFU_QA_ra_pert": ("real_authors", "perturbed"),
    "TOFU_QA_wf": ("world_facts", "answer"),
    "TOFU_QA_wf_pert": ("world_facts", "perturbed"),
}


class OurSequences(Dataset):
    """Our tokens in the format of OpenUnlearning's QADataset."""

    def __init__(
        self, examples: tuple[Example, ...], kind: str, tokenizer: Any, *, generate: bool
    ) -> None:
        self._examples, self._kind = examples, kind
        self._tokenizer, self._generate = tokenizer, generate

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[Any, Any]:
        example = self._examples[index]
        if self._kind == "perturbed":
            answers = enumerate(example.perturbed_answers)
            return {i: self._item(example, answer, index) for i, answer in answers}
        own = example.answer if self._kind == "answer" else example.paraphrased_answer
        return self._item(example, own or "", index)

    def _item(self, example: Example, answer: str, index: int) -> dict[str, Any]:
        tokens: Tokens = encode(Example(answer, example.question), self._tokenizer)
        ids = torch.tensor(tokens.ids)
        labels = ids.clone()
        if self._generate:
            ids = ids[: tokens.prompt]
        else:
            labels[: tokens.prompt] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
            "index": index,
        }


def limit_answers(config: Any, max_new_tokens: int) -> None:
    """Set the length of every generated answer, wherever a metric asks for answers."""
    if "generation_args" in config:
        config.generation_args.max_new_tokens = max_new_tokens
    for inner in config.get("pre_compute", {}).values():
        limit_answers(inner, max_new_tokens)


def their_evaluator(
    checkout: Path, data: SuiteData, tokenizer: Any, max_new_tokens: int
) -> Callable[..., dict[str, Any]]:
    """A function (model, folder, metrics or None for all, reference's file) -> their logs."""
    source = checkout.resolve() / "src"
    sys.path.insert(0, str(source))
    # Its package imports every evaluator, lm-eval's too; its TOFU evaluator needs none of that.
    package = ModuleType("evals")
    package.__path__ = [str(source / "evals")]
    sys.modules["evals"] = package
    import evals.metrics.base  # type: ignore[import-not-found]
    from evals.tofu import TOFUEvaluator  # type: ignore[import-not-found]
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    def get_datasets(dataset_cfgs: Any, **_: object) -> Any:
        made = {}
        for name, config in dataset_cfgs.items():
            part, kind = DATASETS[name]
            made[config.get("access_key", name)] = OurSequences(
                getattr(data, part),
                kind,
                tokenizer,
                generate=config.args.get("predict_with_generate", False),
            )
        return made if len(made) > 1 else next(iter(made.values()))

    evals.metrics.base.get_datasets = get_datasets
    with initialize_config_dir(str(checkout.resolve() / "configs"), version_base=None):
        config = compose(
            "eval",
            overrides=[
                "task_name=compare",
                "hydra/job_logging=none",
                "hydra/hydra_logging=none",
                f"+eval/tofu_metrics=[{','.join(EXTRA_METRICS)}]",
                "eval.tofu.batch_size=8",
            ],
        )

    def run(
        model: Any, folder: Path, only: tuple[str, ...] | None, reference: Path | None
    ) -> dict[str, Any]:
        chosen = config.copy()
        with open_dict(chosen):
            for name in list(chosen.eval.tofu.metrics):
                if only is not None and name not in only:
                    del chosen.eval.tofu.metrics[name]
            for metric in chosen.eval.tofu.metrics.values():
                limit_answers(metric, max_new_tokens)
            chosen.eval.tofu.retain_logs_path = None if reference is None else str(reference)
        evaluator = TOFUEvaluator(chosen.eval.tofu)
        evaluator.evaluate(model, output_dir=str(folder), overwrite=True, tokenizer=tokenizer)
        return dict(json.loads((folder / "TOFU_EVAL.json").read_text(encoding="utf-8")))

    return run


def numbers(entry: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of an entry with their paths."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from numbers(value, (*path, key))
    elif isinstance(entry, list):
        for position, value in enumerate(entry):
            yield from numbers(value, (*path, str(position)))
    else:
        yield path, entry


def gap(theirs: Any, ours: Any) -> float:
    """|theirs - ours|, over |theirs| where that is above 1; infinite where one is no number."""
    if not isinstance(theirs, int | float) or not isinstance(ours, int | float):
        return float("inf")
    return abs(theirs - ours) / max(1.0, abs(theirs))


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a metric of theirs: its aggregate, and the largest gap over its questions."""
    rows = []
    for name, entry in sorted(theirs.items()):
        own = dict(numbers(ours.get(name, {})))
        leaves = dict(numbers(entry))
        texts = {path: x for path, x in leaves.items() if isinstance(x, str)}
        values = {path: x for path, x in leaves.items() if path not in texts}
        questions = [gap(x, own.get(path)) for path, x in values.items() if len(path) > 1]
        row = {
            "metric": name,
            "theirs": entry["agg_value"],
            "ours": own.get(("agg_value",)),
            "difference": gap(entry["agg_value"], own.get(("agg_value",))),
            "numbers_compared": len(values),
            "largest_difference": max(questions, default=0.0),
            "texts_compared": len(texts),
            "texts_equal": sum(own.get(path) == x for path, x in texts.items()),
        }
        row["agrees"] = max(row["difference"], row["largest_difference"]) <= TOLERANCE
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "metric", "theirs", "ours", "difference", "largest of a question's", "texts equal"
    )
    for row in rows:
        said = f"{row['texts_equal']}/{row['texts_compared']}" if row["texts_compared"] else ""
        values = [f"{row[key]:.6g}" for key in ("theirs", "ours") if row[key] is not None]
        gaps = [f"{row[key]:.1e}" for key in ("difference", "largest_difference")]
        table.add_row(row["metric"], *values, *gaps, said, style=None if row["agrees"] else "red")
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--open-unlearning", type=Path, required=True, help="a checkout of it")
    parser.add_argument("--data", required=True, help="TOFU's folder, or its hub name")
    parser.add_argument("--model", required=True, help="the model under test")
    parser.add_argument("--reference", required=True, help="one that never saw the forget set")
    parser.add_argument("--tokenizer", help="where its tokenizer is, if not with the model")
    parser.add_argument("--questions", type=int, default=20, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    task = tofu_task(options.data, 12, 2)
    sets = {name: x[: options.questions] for name, x in SuiteData.of_task(task).sets().items()}
    data = SuiteData(**sets)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in (("model", options.model), ("reference", options.reference))
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Of the reference, only what is said about the forget set is looked at, and no answer.
        bare = SuiteData(data.forget, data.retain[:1], data.holdout)
        reference = evaluate_suite(
            models["reference"], tokenizer, bare, SuiteConfig(max_new_tokens=1)
        )
        ours = evaluate_suite(
            models["model"], tokenizer, data, SuiteConfig(max_new_tokens=options.max_new_tokens)
        )
        ours = with_reference(ours, reference.logs)
        write_openunlearning(ours.logs, folder / "ours")

        run = their_evaluator(options.open_unlearning, data, tokenizer, options.max_new_tokens)
        run(models["reference"], folder / "theirs/reference", REFERENCE_METRICS, None)
        theirs = run(
            models["model"],
            folder / "theirs/model",
            None,
            folder / "theirs/reference/TOFU_EVAL.json",
        )
        written = json.loads((folder / "ours/TOFU_EVAL.json").read_text(encoding="utf-8"))
    rows = compare(theirs, written)
    show(rows)
    missing = [row["metric"] for row in rows if row["ours"] is None]
    holds = all(row["agrees"] for row in rows) and not missing
    commit = subprocess.run(
        ["git", "-C", str(options.open_unlearning), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    write_json(
        options.json,
        {
            "rows": rows,
            "tolerance": TOLERANCE,
            "holds": holds,
            "open_unlearning_commit": commit,
            "task": task.source,
            "questions": {name: len(examples) for name, examples in sets.items()},
            "max_new_tokens": options.max_new_tokens,
            "dtype": "float32",
            "versions": {
                **versions(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
        },
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
