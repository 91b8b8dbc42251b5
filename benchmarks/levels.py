"""How near does each estimate come to what a retrained model knows of what it never saw?

    python benchmarks/levels.py --data TOFU_FOLDER [--authors 12 --forget-authors 2] [--json FILE]

Of TOFU's authors those are taken that neither the full model, nor the reference, nor the rehearsed
one was trained on, in groups as large as the forget set. In each ordered pair of groups the first
stands for the forget set and the second for the unseen text: what the reference gives the first is
estimated from the full model on the second and the rehearsed one on both, as `libortho.goal` does.

The bar: the level carried over has the smallest error of the four estimates (root mean square of
the logarithm).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from libortho.cli.console import progress_bars, write_json
from libortho.data.embedded import embedded_model_path
from libortho.data.examples import Example
from libortho.data.sampling import evenly
from libortho.data.tasks import Task, tofu_task
from libortho.data.tokens import encode
from libortho.evaluation.finetuned import FineTuned, fine_tuned
from libortho.evaluation.tofu import versions
from libortho.goal import REHEARSAL, REHEARSED, carried_over
from libortho.scoring import answer_probability, sequence_nll
from libortho.training import MemoriseConfig

AUTHOR = 20
"""Questions about each of TOFU's authors, one after another."""

CARRIED = "carried over"


def strangers(data: str, task: Task, size: int, most: int) -> list[list[Example]]:
    """At most `most` groups of `size` authors that are in no set of the task."""
    everyone = tofu_task(data, authors=180, forget_authors=1).retain
    sets = (task.forget, task.retain, task.unseen, task.holdout)
    used = {example.question for part in sets for example in part}
    authors = [everyone[i : i + AUTHOR] for i in range(0, len(everyone), AUTHOR)]
    new = [a for a in authors if not any(example.question in used for example in a)]
    random.Random(0).shuffle(new)
    groups = [new[i : i + size] for i in range(0, len(new) - size + 1, size)]
    return [[example for author in group for example in author] for group in groups[:most]]


def estimates(unseen: float, earlier: float, earlier_unseen: float) -> dict[str, float]:
    """Of one pair: from the full model on unseen text, and the rehearsed one on both texts."""
    return {
        "unseen text": unseen,
        "earlier model": earlier,
        "geometric mean of the two": math.sqrt(unseen * earlier),
        CARRIED: carried_over(unseen, earlier, earlier_unseen),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a folder with TOFU's files")
    parser.add_argument("--authors", type=int, default=12)
    parser.add_argument("--forget-authors", type=int, default=2)
    parser.add_argument("--groups", type=int, default=12, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tunes")
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.model or str(embedded_model_path())
    task = tofu_task(options.data, options.authors, options.forget_authors)
    groups = strangers(options.data, task, options.forget_authors, options.groups)
    if len(groups) < 2:
        parser.error(f"{len(groups)} group(s) of authors are left: expected at least 2")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    forget = [encode(example, tokenizer) for example in task.forget]
    retain = [encode(example, tokenizer) for example in task.retain]
    known: dict[str, list[float]] = {}
    with progress_bars() as progress:
        recipe = MemoriseConfig(seed=options.seed)
        full = fine_tuned(folder, [*retain, *forget], recipe, "full", progress)
        same = dataclasses.replace(recipe, target=1.0, max_epochs=full.epochs)
        models: dict[str, FineTuned] = {
            "full": full,
            "reference": fine_tuned(folder, retain, same, "reference", progress),
            "rehearsed": fine_tuned(
                folder, evenly(retain, REHEARSED), REHEARSAL, "rehearsal", progress
            ),
        }
        for name, made in models.items():
            model = made.load()
            known[name] = []
            for done, group in enumerate(groups):
                progress(f"score, {name}", done, len(groups))
                items = [encode(example, tokenizer) for example in group]
                known[name].append(answer_probability(sequence_nll(model, items)))
    errors: dict[str, list[float]] = {}
    for one, other in itertools.permutations(range(len(groups)), 2):
        found = estimates(known["full"][other], known["rehearsed"][one], known["rehearsed"][other])
        for name, value in found.items():
            errors.setdefault(name, []).append(math.log(value / known["reference"][one]))
    rows: dict[str, dict[str, Any]] = {
        name: {
            "mean": sum(values) / len(values),
            "root_mean_square": math.sqrt(sum(v * v for v in values) / len(values)),
        }
        for name, values in errors.items()
    }
    pairs = len(errors[CARRIED])
    title = f"{task.source}: log(estimate / reference), {pairs} pairs of {len(groups)} groups"
    table = Table(title=title, title_justify="left")
    for heading in ("estimate", "mean", "root mean square"):
        table.add_column(heading, justify="left" if heading == "estimate" else "right")
    for name, row in rows.items():
        table.add_row(name, f"{row['mean']:+.3f}", f"{row['root_mean_square']:.3f}")
    Console().print(table)
    holds = min(rows, key=lambda name: rows[name]["root_mean_square"]) == CARRIED
    result = {
        "model": "embedded SmolLM2-135M-Instruct" if options.model is None else "given",
        "task": task.name,
        "seed": options.seed,
        "groups": known,
        "rows": [{"estimate": name, **row} for name, row in rows.items()],
        "holds": holds,
        **versions(),
    }
    write_json(options.json, result)
    print(f"the level carried over has the smallest error: {holds}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
