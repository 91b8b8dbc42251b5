"""What does a split checkpoint cost on disk and on loading, and does it come back bit for bit?

    python benchmarks/checkpoint.py --split DIR --model DIR [--repeat 7] [--json FILE]

`--split` is a split checkpoint, `--model` the model that it was made of (or any of the same size),
which transformers loads in bf16 for comparison. Times and peaks are of `from_pretrained` alone, in
a process of its own each, the two in turns; files are in the page cache. Exit status 1 if a bar is
missed: the same logits, bit for bit; at most 1.02 x the tensors' bytes on disk; at most 1.5 x
transformers' time; at most 1.3 x the checkpoint in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from libortho import alpha_scope
from libortho.checkpoint import load_split, save_split, strip
from libortho.cli.console import write_json
from libortho.evaluation.tofu import versions

MOST_SIZE, MOST_TIME, MOST_MEMORY = 1.02, 1.5, 1.3

# Linux: writing 5 to clear_refs sets the peak of the resident set back to what it is now. Reading
# every tensor afterwards brings in what a memory map has left on disk.
LOAD = """
import json, sys, time
import torch
import libortho
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

dtype = None if sys.argv[2] == "auto" else getattr(torch, sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")
before, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype or "auto")
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
for tensor in model.state_dict().values():
    tensor.view(torch.uint8).amax() if tensor.numel() else None
print(json.dumps({"wall": wall, "cpu": cpu, "peak": status("VmHWM") - before}))
"""


def load_once(folder: Path, dtype: str) -> dict[str, float]:
    """Seconds and bytes of one load in a new process."""
    told = subprocess.check_output([sys.executable, "-c", LOAD, str(folder), dtype], text=True)
    result: dict[str, float] = json.loads(told.splitlines()[-1])
    return result


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


@torch.no_grad()
def logits(model: Any, alpha: float) -> torch.Tensor:
    ids = torch.randint(5, 1000, (2, 48), generator=torch.Generator().manual_seed(0))
    with alpha_scope(model, alpha):
        result: torch.Tensor = model(ids, use_cache=False).logits
    return result


def differing_logits(split: Path, work: Path) -> dict[str, int]:
    """Save what was loaded, whole and in shards; alpha -> how many logits are not the same bits."""
    model = load_split(split)
    save_split(model, work / "whole")
    save_split(model, work / "shards", max_shard_size="50MB")
    again = [load_split(work / name) for name in ("whole", "shards")]
    return {
        str(alpha): sum(int((logits(model, alpha) != logits(x, alpha)).sum()) for x in again)
        for alpha in (0.0, 1.0)
    }


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of all files of a checkpoint without a tokenizer, and of the tensors in them."""
    tensors = {id(t): t.nbytes for t in load_split(folder).state_dict(keep_vars=True).values()}
    return {
        "files": sum(path.stat().st_size for path in folder.iterdir()),
        "tensors": sum(tensors.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", type=Path, required=True, help="a split checkpoint")
    parser.add_argument("--model", type=Path, required=True, help="a model as transformers has it")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        differing = differing_logits(args.split, work)
        size = sizes(work / "whole")
        searched = strip(work / "whole", work / "base")
        mine, theirs = [], []
        for _ in range(args.repeat):
            mine.append(load_once(work / "whole", "auto"))
            theirs.append(load_once(args.model, "bfloat16"))
    split, plain = median(mine), median(theirs)
    bars = {
        "logits that differ after saving": (sum(differing.values()), 0),
        "bytes on disk / of the tensors": (size["files"] / size["tensors"], MOST_SIZE),
        "seconds / transformers in bf16": (split["wall"] / plain["wall"], MOST_TIME),
        "peak memory / bytes on disk": (split["peak"] / size["files"], MOST_MEMORY),
    }
    table = Table("what", "measured", "bar", "reached")
    for what, (measured, bar) in bars.items():
        table.add_row(what, f"{measured:.4g}", f"{bar:g}", "yes" if measured <= bar else "NO")
    Console().print(table)
    write_json(
        args.json,
        {
            "differing_logits": differing,
            "bytes": size,
            "split": split,
            "transformers_bf16": plain,
            "repeat": args.repeat,
            "stripped": {"blocks": searched.blocks, "bytes": searched.nbytes},
            "bars": {what: {"measured": m, "bar": bar} for what, (m, bar) in bars.items()},
            "versions": versions(),
        },
    )
    return 0 if all(measured <= bar for measured, bar in bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
