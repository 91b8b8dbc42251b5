"""What the tests of `separate_` share: a config for small models, and how models are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from libortho import GeometricConfig, SeparationConfig, alpha_scope
from libortho.data.tokens import Tokens
from libortho.scoring import answer_probability, sequence_nll

TARGETS = ("up_proj", "down_proj")


@pytest.fixture(scope="session")
def config() -> Callable[..., SeparationConfig]:
    """`config(edit, targets=, **method)`: a budget that a model of this size needs, without text of
    another vocabulary."""

    def make(
        edit: str = "descent", *, targets: str | tuple[str, ...] = TARGETS, **method: object
    ) -> SeparationConfig:
        chosen = GeometricConfig(edit=edit, **{"ortho_ratio": 0.2, "target_nll": 3.0, **method})
        return SeparationConfig(chosen, target_modules=targets, general_text=False)

    return make


@pytest.fixture(scope="session")
def known() -> Callable[..., float]:
    """`known(model, items, alpha)`: probability per token; without alpha, of the model as it is."""

    def measure(model: nn.Module, items: Sequence[Tokens], alpha: float | None = None) -> float:
        if alpha is None:
            return answer_probability(sequence_nll(model, items))
        with alpha_scope(model, alpha):
            return answer_probability(sequence_nll(model, items))

    return measure


@pytest.fixture(scope="session")
def logits() -> Callable[..., torch.Tensor]:
    """`logits(model, items, alpha)` of sequences of one length, as `known`."""

    def measure(
        model: nn.Module, items: Sequence[Tokens], alpha: float | None = None
    ) -> torch.Tensor:
        ids = torch.tensor([item.ids for item in items])
        with torch.no_grad():
            if alpha is None:
                return model(input_ids=ids).logits
            with alpha_scope(model, alpha):
                return model(input_ids=ids).logits

    return measure


@pytest.fixture(scope="session")
def split_names() -> Callable[[nn.Module], list[str]]:
    """Names of the layers that `config` splits, in the model's order."""
    return lambda model: [n for n, _ in model.named_modules() if n.endswith(TARGETS)]


@pytest.fixture(scope="session")
def assert_unchanged() -> Callable[[dict, dict], None]:
    """Fail unless two snapshots are equal."""

    def check(before: dict, after: dict) -> None:
        assert after["modules"] == before["modules"]
        assert after["flags"] == before["flags"]
        assert after["grads"] == before["grads"]
        assert list(after["state"]) == list(before["state"])
        assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())

    return check
