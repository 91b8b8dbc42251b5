"""The C++ operators of this folder: built once by whoever has a compiler, loaded where they stand.

    python -m libortho.kernels.native     builds them (10 to 30 s); `make dev` runs it

Nothing is compiled behind a user's back, and nothing needs them: without a compiler, or before the
build, PyTorch's own kernels serve (`kernels/cpu.py`), slower. The library is built for the
processor that builds it, so it is kept in the user's cache and not in the package; its name is a
digest of the sources, the flags, torch's version and the processor, so that a stale one is never
loaded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from libortho.files import cache_dir, scratch, unfinished

FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    # Sums may be reordered, which vectors do anyway; infinities and NaN keep their meaning.
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-w",
)
COMPILERS = ("c++", "g++", "clang++")
ROWS, TILES, INT8_TILES = 0, 1, 2
"""The ways of `split_linear`: row by row, by tiles of bf16, by tiles of INT8 with x rounded too."""
_FOLDER = Path(__file__).parent
_STABLE_ABI = (2, 10)  # the first torch whose stable ABI has what ops.cpp calls


class BuildError(RuntimeError):
    """The operators could not be built here; the message says why."""


def compiler() -> str | None:
    """The C++ compiler that a build would use: $CXX, or the first found of `COMPILERS`."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def library_path() -> Path:
    """Where the library for these sources, this torch and this processor is or would be."""
    digest = hashlib.sha256()
    for source in sorted(_FOLDER.glob("*.cpp")) + sorted(_FOLDER.glob("*.h")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for part in (*FLAGS, torch.__version__, platform.machine(), _processor()):
        digest.update(part.encode() + b"\0")
    return cache_dir() / "native" / f"libortho-{digest.hexdigest()[:20]}.so"


def _processor() -> str:
    """What tells this processor's instructions from another's, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build() -> Path:
    """Compile the operators, unless they are there, and return the library's path.

    Raises:
        BuildError: no compiler, a torch too old, or the compiler's own error.
    """
    path = library_path()
    if path.exists():
        return path
    program = compiler()
    if program is None:
        raise BuildError(f"no C++ compiler: set CXX or install one of {', '.join(COMPILERS)}")
    if _torch_version() < _STABLE_ABI:
        raise BuildError(f"torch {torch.__version__} is too old: 2.10 or later is needed")
    root = Path(torch.__file__).parent
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there; the next build removes what a killed one left.
    with scratch(path.parent, unfinished(path), folder=True) as folder:
        target = folder / path.name
        command = [program, *FLAGS, f"-I{root / 'include'}", str(_FOLDER / "ops.cpp")]
        command += ["-o", str(target), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{program} failed:\n{done.stderr.strip()[-2000:]}")
        target.replace(path)
    return path


@functools.cache
def available() -> bool:
    """True where the operators are built for this machine; loads them on the first call."""
    if _torch_version() < _STABLE_ABI:
        return False
    path = library_path()
    if not path.exists():
        return False
    torch.ops.load_library(str(path))

    @torch.library.register_fake("libortho_native::split_linear")
    def _(x, qdata, scale, zero, bias, ortho, alpha, way):  # type: ignore[no-untyped-def]
        return x.new_empty(*x.shape[:-1], qdata.shape[0])

    @torch.library.register_fake("libortho_native::add_ortho_")
    def _(y, x, ortho, alpha):  # type: ignore[no-untyped-def]
        return None

    return True


@functools.cache
def has_tiles() -> bool:
    """True where there are instructions that multiply bf16; `available()` must be True."""
    return bool(torch.ops.libortho_native.has_tiles())


@functools.cache
def has_matrix_tiles() -> bool:
    """True where these are AMX's, of whole tiles, and not AVX-512's, of vectors."""
    return bool(torch.ops.libortho_native.has_matrix_tiles())


@functools.cache
def split_linear() -> Callable[..., Tensor]:
    """`split_linear(x, qdata, scale, zero, bias, ortho, alpha, way)`; see `ops.cpp`."""
    return torch.ops.libortho_native.split_linear.default


@functools.cache
def add_ortho() -> Callable[..., None]:
    """`add_ortho_(y, x, ortho, alpha)`: y += alpha * ortho(x), in place."""
    return torch.ops.libortho_native.add_ortho_.default


@functools.cache
def add_gram() -> Callable[..., None]:
    """`add_gram_(matrix, rows)`: see `kernels.reference.add_gram_`; bf16 and tiles only."""
    return torch.ops.libortho_native.add_gram_.default
