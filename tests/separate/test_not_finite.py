"""Texts of which a model makes NaN or Inf: which one and where is said, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from libortho import (
    CurvatureConfig,
    GeometricConfig,
    SaliencyConfig,
    SeparationConfig,
    SpectralConfig,
    separate_,
)
from libortho.data.tokens import Tokens
from libortho.streaming import separate_streamed
from libortho.workers import Piece, ThisProcess

TARGETS = ("up_proj", "down_proj")
FIRST = "model.layers.0.mlp.up_proj"
ODD = 63
"""A token that the texts do not hold, but for one."""

METHODS = {
    "geometric": GeometricConfig(ortho_ratio=0.2, target_nll=3.0),
    "projection": GeometricConfig(edit="projection", ortho_ratio=0.2, target_nll=3.0),
    "saliency": SaliencyConfig(ortho_ratio=0.1, target_nll=3.0),
    "curvature": CurvatureConfig(ortho_ratio=0.2),
    "spectral": SpectralConfig(),
}


def plain(items: list[Tokens]) -> list[Tokens]:
    return [Tokens(tuple(3 if t == ODD else t for t in i.ids), i.prompt) for i in items]


def with_odd(items: list[Tokens], index: int) -> list[Tokens]:
    items = plain(items)
    ids = list(items[index].ids)
    ids[1] = ODD
    items[index] = Tokens(tuple(ids), items[index].prompt)
    return items


@pytest.fixture(params=[float("nan"), float("inf")], ids=["nan", "inf"])
def broken(memorised, request: pytest.FixtureRequest) -> Any:
    """A model that makes NaN or Inf of one token, and of nothing else; every weight of the targets
    is a number."""
    with torch.no_grad():
        memorised.model.get_input_embeddings().weight[ODD] = request.param
    return memorised


@pytest.fixture
def state_of(snapshot: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """`snapshot`, in which NaN is equal to NaN."""

    def take(model: Any) -> dict:
        found = snapshot(model)
        found["state"] = {name: t.nan_to_num(nan=1e9) for name, t in found["state"].items()}
        return found

    return take


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["forget", "retain"])
def test_the_text_and_the_layer_are_named(
    broken, state_of, assert_unchanged, method: str, where: str
) -> None:
    forget, retain = plain(broken.forget), plain(broken.retain)[:8]
    if where == "forget":
        forget = with_odd(forget, 1)
    else:
        retain = with_odd(retain, 5)
    before = state_of(broken.model)
    config = SeparationConfig(METHODS[method], TARGETS, general_text=False)
    index = 1 if where == "forget" else 5
    with pytest.raises(ValueError, match=rf"^{where}\[{index}\]: .* NaN or Inf at {FIRST}$"):
        separate_(broken.model, forget, retain, config)
    assert_unchanged(before, state_of(broken.model))


def test_unseen_text_and_the_earlier_model(broken, state_of, assert_unchanged) -> None:
    forget, retain = plain(broken.forget), plain(broken.retain)[:8]
    config = SeparationConfig(GeometricConfig(ortho_ratio=0.2), TARGETS, general_text=False)
    before = state_of(broken.model)
    with pytest.raises(ValueError, match=rf"^unseen\[2\]: .* NaN or Inf at {FIRST}$"):
        separate_(broken.model, forget, retain, config, unseen=with_odd(broken.unseen, 2))
    assert_unchanged(before, state_of(broken.model))
    earlier = copy.deepcopy(broken.model)
    whole = copy.deepcopy(broken.before)
    before = state_of(whole)
    with pytest.raises(ValueError, match=rf"^the earlier model, retain\[3\]: .* at {FIRST}$"):
        separate_(whole, forget, with_odd(retain, 3), config, before=earlier)
    assert_unchanged(before, state_of(whole))


class InOtherProcesses(ThisProcess):
    """Workers that load the model by its name, as those of a cluster do."""

    def __init__(self, model: Path) -> None:
        self.model = str(model)

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        import pickle

        for name, piece in pieces.items():
            function, arguments = pickle.loads(pickle.dumps((piece.function, piece.arguments)))
            yield name, function(*arguments)


def test_with_workers(broken, state_of, assert_unchanged, tmp_path: Path) -> None:
    broken.model.save_pretrained(tmp_path)
    before = state_of(broken.model)
    config = SeparationConfig(METHODS["projection"], TARGETS, general_text=False)
    with pytest.raises(ValueError, match=rf"^retain\[5\]: .* NaN or Inf at {FIRST}$"):
        separate_(
            broken.model,
            plain(broken.forget),
            with_odd(broken.retain[:8], 5),
            config,
            workers=InOtherProcesses(tmp_path),
        )
    assert_unchanged(before, state_of(broken.model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_streamed(tiny_llama: Callable[..., Any], tmp_path: Path, value: float) -> None:
    """No text is looked at: what can be wrong is a weight."""
    model = tiny_llama()
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = value
    model.save_pretrained(tmp_path / "model")
    config = SeparationConfig(SpectralConfig(), ("down_proj",))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        separate_streamed(str(tmp_path / "model"), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
