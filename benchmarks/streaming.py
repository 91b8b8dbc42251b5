"""Can a model be split that is several times larger than the memory there is, and after a kill?

    python benchmarks/streaming.py [--layers 64] [--limit 1.0] [--work DIR]

Makes a Llama of random weights (layers of 512 x 16,384, 3.3 GB in bf16), then splits it from disk
to disk in processes of their own, in a memory cgroup with the limit, in GiB (Linux, as root; page
cache counts too, and is reclaimed). The first process is killed when half of the layers are
finished; the second goes on. Peaks are the operating system's: all resident memory, and of it what
is no file's page. Exit status 1 if a bar is missed: the checkpoint is at least 3 x the limit; the
peak is at most what one layer needs and 2 GiB; no layer is done twice; the result passes
`verify_split`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from libortho.checkpoint import verify_split
from libortho.evaluation.tofu import versions
from libortho.files import write_json
from libortho.solvers.spectral import spectral_memory

HIDDEN, INNER, VOCABULARY = 512, 16384, 32000
STRIDE = 997
LEAST_RATIO = 3.0
GIB = 2**30
RESULT = Path(__file__).parent / "results" / "streaming.json"

SPLIT = """
import os, sys
open(sys.argv[3], "w").write(str(os.getpid()))
from libortho import SeparationConfig, SpectralConfig
from libortho.streaming import separate_streamed
def tell(stage, done, total):
    print(stage, done, total, flush=True)
separate_streamed(sys.argv[1], sys.argv[2], SeparationConfig(SpectralConfig()), progress=tell)
"""


@dataclass
class Run:
    """One process: how long it took, what it did, and its peaks in bytes."""

    seconds: float = 0.0
    layers: int = 0
    killed: bool = False
    peak: int = 0
    peak_anonymous: int = 0


def make_model(folder: Path, layers: int) -> None:
    """A Llama of random weights, one file a block, never more than a block in memory."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    ).save_pretrained(str(folder))
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    # Each block has its own stretch of one pool of random numbers.
    size = max(INNER * HIDDEN + STRIDE * layers, VOCABULARY * HIDDEN)
    pool = (torch.randn(size, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5).bfloat16()
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    index: dict[str, str] = {}
    for number in range(-1, layers):
        embedding = pool[: VOCABULARY * HIDDEN].view(VOCABULARY, HIDDEN)
        tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones}
        if number >= 0:
            block, start = f"model.layers.{number}", STRIDE * number
            tensors = {
                f"{block}.{name}.weight": pool[start : start + m * n].view(m, n).clone()
                for name, (m, n) in shapes.items()
            }
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{block}.{norm}.weight"] = ones.clone()
        name = f"model-{number + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    plain = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(plain))


def status(pid: int, key: str) -> int:
    """A line of /proc/<pid>/status, in bytes; 0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{key}:")), 0)


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A memory cgroup of `limit` bytes: yields the file that takes a process into it.

    Raises:
        OSError: there are no cgroups here, or this user may not make one.
    """
    root = Path("/sys/fs/cgroup")
    unified = (root / "cgroup.controllers").exists()
    group = (root if unified else root / "memory") / f"libortho-streaming-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def split(model: Path, out: Path, procs: Path, kill_at: int | None) -> Run:
    """Split in a new process; kill it when `kill_at` layers are finished."""
    run, start = Run(), time.perf_counter()
    folder = out.parent / f".{out.name}.unfinished"
    said = out.parent / f"log-{kill_at}"
    with said.open("w") as log:
        command = [sys.executable, "-c", SPLIT, str(model), str(out), str(procs)]
        process = subprocess.Popen(command, stdout=log)
        while process.poll() is None:
            run.peak = max(run.peak, status(process.pid, "VmHWM"))
            run.peak_anonymous = max(run.peak_anonymous, status(process.pid, "RssAnon"))
            if kill_at is not None and len(list(folder.glob("*.safetensors"))) >= kill_at:
                process.kill()
                run.killed = True
                break
            time.sleep(0.02)
        if process.wait() != 0 and not run.killed:
            raise RuntimeError(f"the split ended with status {process.returncode}")
    # It tells of those that it found first, and then of each that it has finished itself.
    run.layers = said.read_text().count("split layers") - 1
    run.seconds = time.perf_counter() - start
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--limit", type=float, default=1.0, help="of a process, in GiB")
    parser.add_argument("--work", type=Path, help="a folder on a disk with 10 GB to spare")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    limit = int(args.limit * GIB)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        (work / "model").mkdir()
        make_model(work / "model", args.layers)
        size = sum(path.stat().st_size for path in (work / "model").glob("*.safetensors"))
        with limited(limit) as procs:
            runs = [
                split(work / "model", work / "out", procs, args.layers // 2),
                split(work / "model", work / "out", procs, None),
            ]
        found = verify_split(work / "out")
        written = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
    need, peak = spectral_memory((HIDDEN, INNER)), max(run.peak for run in runs)
    done = sum(run.layers for run in runs)
    bars = {
        "checkpoint / limit, at least": (size / limit, LEAST_RATIO),
        "peak less one layer's need, GiB, at most": ((peak - need) / GIB, 2.0),
        "layers done twice, at most": (done - args.layers, 0),
        "layers missing, at most": (args.layers - len(found.manifest.layers), 0),
    }
    holds = {
        what: value >= bar if what.endswith("least") else value <= bar
        for what, (value, bar) in bars.items()
    }
    table = Table("what", "measured", "bar", "holds")
    for what, (value, bar) in bars.items():
        table.add_row(what, f"{value:.3g}", f"{bar:g}", "yes" if holds[what] else "NO")
    for label, run in zip(("killed", "resumed"), runs, strict=True):
        told = f"{run.layers} layers, {run.seconds:.0f} s, peak {run.peak / GIB:.2f} GiB"
        table.add_row(label, f"{told}, {run.peak_anonymous / GIB:.2f} of it no file's", "", "")
    Console(width=110).print(table)
    write_json(
        args.json,
        {
            "checkpoint_bytes": size,
            "written_bytes": written,
            "limit_bytes": limit,
            "layer_bytes_needed": need,
            "layers": args.layers,
            "shape": [HIDDEN, INNER],
            "threads": torch.get_num_threads(),
            "runs": [asdict(run) for run in runs],
            "bars": {what: {"measured": v, "bar": b} for what, (v, b) in bars.items()},
            "versions": versions(),
        },
    )
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
