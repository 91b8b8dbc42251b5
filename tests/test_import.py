"""`import libortho` is light: no optional package, no CUDA, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import libortho

HEAVY = (
    "transformers",
    "peft",
    "compressed_tensors",
    "gguf",
    "scipy",
    "matplotlib",
    "datasets",
    "vllm",
)
PROGRAM = f"""
import sys
import libortho
import libortho.data
import libortho.export
print(sorted(set({HEAVY!r}) & set(sys.modules)))
import torch
print(torch.cuda.is_initialized())
"""


IMPORT_TIME = """
import time
import torch
torch_done = time.process_time()
import libortho
print(time.process_time() / torch_done)
"""


def test_imports_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.splitlines() == ["[]", "False"]
    assert result.stderr == ""


def test_public_names() -> None:
    assert sorted(libortho.__all__) == libortho.__all__
    for name in libortho.__all__:
        assert getattr(libortho, name).__doc__, name
    assert libortho.__version__.count(".") >= 1


def test_importing_takes_little_longer_than_torch() -> None:
    # CPU time from the interpreter's start; the best of three, as a busy machine adds to either.
    ratios = [
        float(subprocess.check_output([sys.executable, "-c", IMPORT_TIME], text=True, timeout=300))
        for _ in range(3)
    ]
    assert min(ratios) <= 1.3
