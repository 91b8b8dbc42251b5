"""Split a model that does not fit into memory: layer by layer, from disk to disk.

plan -> split each layer that is not finished yet, and keep it -> assemble the checkpoint

Only for methods that split a layer from its weight alone. A finished layer is on disk (see
`checkpoint.parts`), so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import os
import shutil
from collections import ChainMap
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import libortho
from libortho.base import check_width
from libortho.checkpoint.atomic import check_writable
from libortho.checkpoint.names import PathLike
from libortho.checkpoint.parts import LayerPart, Parts
from libortho.checkpoint.sealed import sealing_key
from libortho.checkpoint.skeleton import linear_shape
from libortho.checkpoint.write import save_split
from libortho.config import to_dict
from libortho.linear import install, select_linear
from libortho.measures import untouched_layers
from libortho.methods import METHODS, method_of
from libortho.offload import ModelOnDisk
from libortho.report import SeparationReport, measure_layer
from libortho.separate import SeparationConfig
from libortho.solvers import SOLVERS
from libortho.solvers.problem import Journal, LayerSolver, Progress, timed
from libortho.solvers.spectral import spectral_memory
from libortho.workers import Piece, ThisProcess, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_SIZE = "500MB"
"""Of one file of the base, which is how much is held at most while the checkpoint is assembled."""

NOT_RUN = (
    "the model was never run, for it does not fit into memory: nothing is measured of any text; "
    "`libortho eval` measures the split where it fits"
)


def separate_streamed(
    model: str,
    out: PathLike,
    config: SeparationConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    forgotten: str | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> SeparationReport:
    """Split a model from disk to disk, holding one layer, or one file of the result, at a time.

    The tensors, `config.json` and `ortho_config.json` are bit for bit those of `separate_` and
    `save_split` on as many threads. Finished layers wait in `.<name of out>.unfinished` beside
    `out`, their ortho streams encrypted where there is a key in use (see `save_split`), and a run
    with the same arguments goes on from them.

    Args:
        model: a local folder or a Hugging Face name, taken in bf16.
        out: as `save_split`'s folder.
        config: its method must split a layer from its weight alone (see `streamed_methods`).
        tokenizer, base_model, forgotten: as in `save_split`.
        progress: called as work goes on.
        workers: who splits the layers; this process by default.

    Returns:
        A report of the layers. `reached` is None: nothing is claimed of any text.

    Raises:
        ValueError: a method that has to run the model; the waiting layers are of another run; or
            as `separate_`.
        TypeError: as `separate_`.
        OSError: as `save_split`.
    """
    check_streamed(config)
    check_writable(out)
    journal = Journal(progress)
    source = ModelOnDisk(model)
    layers = select_linear(source.model, config.target_modules)
    shapes = {name: _shape(linear_shape(layer)) for name, layer in layers.items()}
    for name, (_, columns) in shapes.items():
        check_width(columns, config.method.base, name)
    settings = {
        "libortho": libortho.__version__,
        "torch": torch.__version__,
        "target_modules": list(config.target_modules),
        "method": to_dict(config.method),
    }
    out = Path(os.path.realpath(out))  # what waits is to be on its disk, not on that of a link
    folder = out.parent / f".{out.name}.unfinished"
    key = sealing_key()
    parts = Parts(folder, {**settings, "files": source.files()}, key)
    by_layer = SOLVERS[type(config.method)].by_layer
    assert by_layer is not None
    solvers = by_layer(config.method, list(layers))
    with journal.stage("solve"):
        pieces = {
            name: Piece(
                split_one,
                (source, name, method_of(config.method), solvers[name]),
                spectral_memory(shapes[name]),
            )
            for name in layers
            if name not in parts.reports
        }
        journal.tell("split layers", len(parts.reports), len(layers))
        for _, part in (workers or ThisProcess()).each(pieces):
            parts.add(part)
            journal.tell("split layers", len(parts.reports), len(layers))
    install(source.model, parts.layers(layers))
    report = SeparationReport(
        layers=tuple(parts.reports[name] for name in layers),
        skipped=untouched_layers(source.model),
        target={"aimed_at": "nothing: this method looks at weights alone"},
        reached=None,
        warnings=(NOT_RUN,),
        seconds=journal.seconds,
        settings=settings,
    )
    journal.tell("assemble", 0, 1)
    save_split(
        source.model,
        out,
        tokenizer=tokenizer,
        report=report,
        base_model=base_model,
        forgotten=forgotten,
        max_shard_size=SHARD_SIZE,
        stored=ChainMap(parts, source.weights),  # type: ignore[arg-type]
        partial=folder / "assembled",
    )
    journal.tell("assemble", 1, 1)
    shutil.rmtree(folder)
    return report


def check_streamed(config: SeparationConfig) -> None:
    """Raise ValueError where `config`'s method cannot split layer by layer."""
    if SOLVERS[type(config.method)].by_layer is None:
        raise ValueError(
            f"method {method_of(config.method)!r} runs the whole model (for statistics or "
            "gradients) and cannot be streamed from disk; the methods that can: "
            + ", ".join(map(repr, streamed_methods()))
        )


def streamed_methods() -> list[str]:
    """Names of the methods that split a layer from its weight alone."""
    return [name for name, kind in METHODS.items() if SOLVERS[kind].by_layer is not None]


def split_one(source: ModelOnDisk, name: str, method: str, solve: LayerSolver) -> LayerPart:
    """Read one layer, split it, and measure the split."""
    weight, bias = source.linear(name)
    split = timed(solve, weight)
    return LayerPart.of(split, bias, measure_layer(name, method, weight, split))


def _shape(shape: tuple[int, int] | None) -> tuple[int, int]:
    assert shape is not None  # of a linear layer
    return shape
