"""The Triton program, under Triton's interpreter: no GPU is needed for its arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from libortho.kernels import triton


def test_under_the_interpreter() -> None:
    if not triton.available():
        pytest.skip("triton is not installed (requirements-dev.txt has it)")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_triton.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count = int(done.stdout.split()[0])
    assert count > 90


def test_what_it_leaves_to_the_reference() -> None:
    # No Triton is imported for these: it has no fp64 products, and nothing to do on empty tensors.
    qdata, scale = torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1)
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(triton.linear(x, qdata, scale), x.sum(1, keepdim=True).expand(2, 3))
    assert triton.linear(x[:0].float(), qdata, scale).shape == (0, 3)
