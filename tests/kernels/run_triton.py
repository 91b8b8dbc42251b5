"""Run the Triton program under its interpreter on small layers; `test_triton.py` starts this file.

A process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from libortho.kernels import triton

sys.path.insert(0, str(Path(__file__).parent))
import cases

# (rows, in_features, out_features): one tile, tails of each block, and several tiles each way.
SHAPES = [(9, 7, 41), (17, 192, 33), (70, 70, 67)]
TOLERANCES = {
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (6e-2, 2e-2),
    torch.float16: (1e-2, 4e-3),
}


def main() -> None:
    """Compare every case, and print how many there were."""
    torch.manual_seed(0)
    seen = 0
    for rows, in_features, out_features in SHAPES:
        for number, (base, ortho, alpha) in enumerate(cases.all_cases()):
            if not cases.fits(base, in_features):
                continue
            # Every case in one dtype, all dtypes in turn: the interpreter takes its time.
            dtype = list(TOLERANCES)[(number + rows) % len(TOLERANCES)]
            operands = cases.make(
                base, ortho, alpha, rows, in_features, out_features, bias=number % 2 == 0
            )
            x = torch.randn(rows, in_features).to(dtype)
            y = operands(triton.linear, x)
            assert y.dtype == dtype, (base, ortho, alpha)
            atol, rtol = TOLERANCES[dtype]
            torch.testing.assert_close(
                y.double(),
                cases.exact(operands, x),
                atol=atol,
                rtol=rtol,
                msg=lambda text, at=(base, ortho, alpha, rows, dtype): f"{at}: {text}",
            )
            seen += 1
    batch = torch.randn(2, 5, 64)
    operands = cases.make("int8", "sparse", "rows", 10, 64, 41, bias=True)
    torch.testing.assert_close(
        operands(triton.linear, batch).double(), cases.exact(operands, batch), atol=2e-5, rtol=2e-5
    )
    _what_overflows_stays_out_of_the_rows_at_alpha_0()
    print(f"{seen + 1} cases agree")


def _what_overflows_stays_out_of_the_rows_at_alpha_0() -> None:
    for ortho in ("low_rank bf16", "sparse fp32"):
        operands = cases.make("int8", ortho, "rows", 2, 64, 41, bias=False)
        huge = tuple(
            torch.full_like(part, 3e38) if part.is_floating_point() else part
            for part in operands.ortho
        )
        split = dataclasses.replace(operands, ortho=huge, alpha=torch.tensor([0.0, 1.0]))
        alone = dataclasses.replace(operands, ortho=(), alpha=None)
        x = torch.full((2, 64), 8.0)
        y = split(triton.linear, x)
        torch.testing.assert_close(y[0], alone(triton.linear, x)[0])
        assert not torch.isfinite(y[1]).all()


if __name__ == "__main__":
    main()
