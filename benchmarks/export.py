"""What each export costs: its answers' NLL beside those of LibOrtho itself, at alpha 0 and 1.

    python benchmarks/export.py SPLIT [--text forget.jsonl --text retain.jsonl] [--limit 20]

SPLIT is that of the demo (`libortho tofu --out DIR` leaves it in DIR/split), whose forget and
retain questions are asked; of another split, --text names files of its own.

Every export is written to a temporary folder and read by the tool that it is for: transformers,
PEFT, or transformers' GGUF reader (the base alone: it reads no adapter).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from libortho import alpha_scope
from libortho.checkpoint import load_split
from libortho.cli.console import write_json
from libortho.data.examples import read_jsonl
from libortho.data.sampling import evenly
from libortho.data.tasks import embedded_task
from libortho.data.tokens import Tokens, encode
from libortho.evaluation.tofu import versions
from libortho.export import (
    CompressedTensorsExport,
    DenseExport,
    GgufExport,
    PeftExport,
    export_split,
)
from libortho.scoring import sequence_nll

CASES: dict[str, Any] = {
    "dense, alpha 0": DenseExport(0.0),
    "dense, alpha 1": DenseExport(1.0),
    "peft": PeftExport(),
    "compressed-tensors, 16bit": CompressedTensorsExport(),
    "compressed-tensors, int8": CompressedTensorsExport(activations="int8"),
    "gguf, f16": GgufExport(storage="f16"),
    "gguf, q8_0": GgufExport(storage="q8_0"),
}


def nlls(model: Any, texts: list[list[Tokens]]) -> list[float]:
    """Mean NLL per token of each text."""
    return [float(torch.cat(sequence_nll(model, items)).mean()) for items in texts]


@contextmanager
def as_served(name: str, folder: Path) -> Iterator[dict[float, tuple[Any, Callable[[], Any]]]]:
    """alpha -> (model, a context in which it has that alpha)."""
    if name.startswith("dense"):
        yield {float(name[-1]): (read(folder), nullcontext)}
        return
    if name.startswith("gguf"):
        yield {0.0: (read(folder, gguf_file="base.gguf").bfloat16(), nullcontext)}
        return
    from peft import PeftModel

    base = read(folder / "base")
    with torch.no_grad():
        base(torch.tensor([[1, 2]]))  # compressed weights become numbers, which PEFT needs
    model = PeftModel.from_pretrained(base, folder / "ortho").eval()
    yield {0.0: (model, model.disable_adapter), 1.0: (model, nullcontext)}


def read(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("split", type=Path)
    parser.add_argument("--text", type=Path, action="append", help="JSONL; default: the demo's")
    parser.add_argument("--limit", type=int, default=20, help="examples of each text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.split)
    model = load_split(options.split)
    task = embedded_task()
    sets = {"forget": task.forget, "retain": task.retain}
    if options.text:
        sets = {path.stem: tuple(read_jsonl(path)) for path in options.text}
    texts = [
        [encode(example, tokenizer) for example in evenly(examples, options.limit)]
        for examples in sets.values()
    ]
    rows = []
    for alpha in (0.0, 1.0):
        with alpha_scope(model, alpha):
            rows.append({"export": "libortho", "alpha": alpha, "nll": nlls(model, texts)})
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "out"
            report = export_split(model, folder, config, tokenizer=tokenizer)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            with as_served(name, folder) as served:
                for alpha, (exported, scope) in served.items():
                    with scope():
                        found = nlls(exported, texts)
                    rows.append(
                        {
                            "export": name,
                            "alpha": alpha,
                            "nll": found,
                            "weight_error": report.weight_error,
                            "megabytes": size / 1e6,
                        }
                    )
    table = Table("export", "alpha", *sets, "weights move", "MB")
    for row in rows:
        table.add_row(
            row["export"],
            f"{row['alpha']:g}",
            *(f"{value:.4f}" for value in row["nll"]),
            f"{row['weight_error']:.2g}" if "weight_error" in row else "",
            f"{row['megabytes']:.1f}" if "megabytes" in row else "",
        )
    Console(width=120).print(table)
    questions = {name: len(items) for name, items in zip(sets, texts, strict=True)}
    write_json(options.json, {"rows": rows, "questions": questions, "versions": versions()})


if __name__ == "__main__":
    main()
