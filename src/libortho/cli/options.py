"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from libortho.checkpoint.names import CONFIG
from libortho.checkpoint.reports import read_template
from libortho.config import BaseConfig
from libortho.data.examples import check_file
from libortho.data.tokens import Template
from libortho.files import check_makeable
from libortho.goal import Earlier
from libortho.methods import METHODS
from libortho.methods.graft import GraftConfig
from libortho.methods.spectral import spectral_base
from libortho.separate import SeparationConfig
from libortho.training import MemoriseConfig


def _makeable(path: Path | None) -> Path | None:
    if path is not None:
        try:
            check_makeable(path)
        except OSError as error:
            raise typer.BadParameter(str(error)) from None
    return path


# Checked before the work whose result it is to hold.
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        dir_okay=False,
        callback=_makeable,
        help="Write the result as JSON to this file; one that is there is replaced.",
    ),
]
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of everything random.")]
Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        help="Layers to split: a module-name suffix or a regular expression; may be repeated.",
    ),
]
OrthoRatio = Annotated[
    float, typer.Option(help="Ortho parameters over the targeted layers' parameters, a fraction.")
]
Method = Annotated[
    str,
    typer.Option(
        help="geometric; graft (a base that never saw what it forgets: needs --before and all "
        "that is to stay); saliency (sparse, by gradients); curvature (needs no forget set); or "
        "spectral (the original, data-free)."
    ),
]
_TRAINING = MemoriseConfig()
_RECIPE = (
    f"AdamW at {_TRAINING.learning_rate:g}, batches of {_TRAINING.batch_size}, at most "
    f"{_TRAINING.max_epochs} epochs, until the answers' probability is {_TRAINING.target:g}"
)
EarlierOption = Annotated[
    str,
    typer.Option(
        "--earlier",
        help="How --before is asked: rehearse (train a copy on --retain: for a moment, or with "
        f"--method graft to the end: {_RECIPE}), show (some examples of it), or trust (it was "
        "trained without what is to be forgotten: with --method graft, by your own trainer).",
    ),
]
LEARNING_RATE = _TRAINING.learning_rate
LearningRate = Annotated[
    float,
    typer.Option(
        help="Step size (AdamW) of the fine-tunes that are done here. The default suits a model of "
        "a hundred million parameters; for billions, 1e-5 to 2e-5 is usual."
    ),
]
Base = Annotated[
    str, typer.Option(help="How the base is stored: int8, int4 (in groups of 64) or fp16.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model over devices: auto, balanced, balanced_low_0 or sequential "
        "(accelerate's), or one device such as cuda:0; the CPU by default."
    ),
]
TemplateOption = Annotated[
    str, typer.Option("--template", help="How a question becomes a prompt: plain or chat.")
]
SplitTemplate = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="How a question becomes a prompt: plain or chat; default: the split's own.",
    ),
]


def method_config(
    name: str, ortho_ratio: float, seed: int, base: str, target_nll: float | None = None
) -> Any:
    """The config of a method that splits, from its name and the options.

    Raises:
        ValueError: a name or a value that is not among those that are possible.
    """
    if name not in METHODS:
        raise ValueError(f"--method {name!r}: expected one of {', '.join(sorted(METHODS))}")
    if base not in ("int8", "int4", "fp16"):
        raise ValueError(f"--base {base!r}: expected int8, int4 or fp16")
    stored: Any = spectral_base if name == "spectral" else BaseConfig
    values: dict[str, Any] = {"ortho_ratio": ortho_ratio, "seed": seed, "base": stored(base)}
    if target_nll is not None:
        if "target_nll" not in {field.name for field in dataclasses.fields(METHODS[name])}:
            raise ValueError(f"--target-nll: method {name} aims at no level")
        values["target_nll"] = target_nll
    return METHODS[name](**values)


def at_learning_rate(config: SeparationConfig, rate: float) -> SeparationConfig:
    """The config with this step size for whatever it fine-tunes."""
    method = config.method
    if isinstance(method, GraftConfig):
        training = dataclasses.replace(method.training, learning_rate=rate)
        method = dataclasses.replace(method, training=training)
    rehearsal = dataclasses.replace(config.rehearsal, learning_rate=rate)
    return dataclasses.replace(config, method=method, rehearsal=rehearsal)


def check_earlier(name: str) -> Earlier:
    """How an earlier model is asked, checked."""
    if name not in ("rehearse", "show", "trust"):
        raise ValueError(f"--earlier {name!r}: expected rehearse, show or trust")
    return name  # type: ignore[return-value]


def check_template(name: str) -> Template:
    """A template's name, checked."""
    if name not in ("plain", "chat"):
        raise ValueError(f"--template {name!r}: expected plain or chat")
    return name  # type: ignore[return-value]


def check_readable(option: str, path: Path) -> Path:
    """The path, if there is something to read; else FileNotFoundError, which names the option."""
    try:
        return check_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option}: {error}") from None


def check_model(option: str, name: str) -> None:
    """Before any work, raise ValueError where `load_model` would find no model of this name.

    The hub, which is waited for while it cannot be reached, is asked for the config alone.
    """
    from transformers.utils.hub import cached_file

    expected = "expected the folder of a causal LM or its Hugging Face name"
    place = Path(name)
    if name and place.exists():
        if (place / "adapter_config.json").is_file():
            raise ValueError(
                f"{option} {name!r} is a PEFT adapter (it holds adapter_config.json): merge it "
                "first, by PEFT's merge_and_unload(), and save the model that this returns"
            )
        if not (place / CONFIG).is_file():
            raise ValueError(f"{option} {name!r} holds no {CONFIG}: {expected}")
        return
    try:
        cached_file(name, CONFIG)
    except OSError as error:
        # A path is no name that could be at the hub, which is not asked then.
        asked = not isinstance(error.__cause__, ValueError)
        said = f" (the hub: {' '.join(str(error).split())})" if asked else ""
        raise ValueError(f"{option} {name!r} is not there: {expected}{said}") from None


def split_template(name: str | None, folder: Path, unknown: Template) -> Template:
    """How a split is asked: as `--template` says, else as it was made and measured.

    Args:
        name: what `--template` was given, if anything.
        folder: the split.
        unknown: for a folder that does not say how it was measured.

    Raises:
        ValueError: a name that there is not.
        CheckpointError: the split's report is malformed.
    """
    if name is not None:
        return check_template(name)
    return read_template(folder) or unknown
