"""The descent on a loss that an edit can bring to 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_layers import SHAPES, cost, moment

from libortho.gram import Gram
from libortho.methods.descent import Descent
from libortho.methods.edits import LowRankEdit, Metric, retain_metric


class Toy:
    """A loss that an edit can bring to 0: the squared response of each layer to one input."""

    def __init__(self) -> None:
        self.weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        self.inputs = {name: torch.randn(shape[1]) for name, shape in SHAPES.items()}
        self.metrics = {
            name: retain_metric(Gram.of(moment(shape[1])), 0.1, scale)
            for (name, shape), scale in zip(SHAPES.items(), (1.0, 4.0), strict=True)
        }

    def __call__(self, edits: dict[str, LowRankEdit]) -> tuple[float, dict[str, Tensor]]:
        loss, gradients = 0.0, {}
        for name, weight in self.weights.items():
            y = (weight + edits[name].left @ edits[name].right) @ self.inputs[name]
            loss += float(y.square().sum())
            gradients[name] = 2 * torch.outer(y, self.inputs[name])
        return loss, gradients

    def by_factors(self, edits: dict[str, LowRankEdit]) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (g @ edits[name].right.T, edits[name].left.T @ g)
            for name, g in self(edits)[1].items()
        }

    def run(self, budget: int, find: int = 4, fit: int = 10) -> tuple[Descent, list[float]]:
        descent = Descent(self.metrics, SHAPES, budget, seed=3)
        losses = []
        for step in range(find + fit):
            loss, gradients = self(descent.edits())
            losses.append(loss)
            if step < find:
                descent.find(loss, gradients, 0.4)
            else:
                descent.fit(self.by_factors(descent.edits()), 0.1)
            assert cost(descent.edits()) <= budget
        return descent, [*losses, self(descent.edits())[0]]


def test_descent_brings_the_loss_down() -> None:
    toy = Toy()
    _, losses = toy.run(16 + 17)
    assert losses[4] < 0.5 * losses[0]  # by finding
    assert losses[-1] < 0.2 * losses[0]  # and fitting


def test_descent_starts_at_no_edit() -> None:
    toy = Toy()
    edits = Descent(toy.metrics, SHAPES, 33).edits()
    assert {name: e.rank for name, e in edits.items()} == {"a": 0, "b": 0}
    assert all((e.left @ e.right).shape == SHAPES[name] for name, e in edits.items())


def test_first_step_is_the_natural_gradient() -> None:
    toy = Toy()
    descent = Descent(toy.metrics, SHAPES, 10**4)
    loss, gradients = toy(descent.edits())
    descent.find(loss, gradients, 0.5)
    exact, square = {}, 0.0
    for name, gradient in gradients.items():
        metric: Metric = toy.metrics[name]
        inverse = torch.linalg.inv(metric.factor.double() @ metric.factor.double().T) / metric.scale
        exact[name] = gradient.double() @ inverse
        square += float((gradient.double() * exact[name]).sum())
    for name, edit in descent.edits().items():
        torch.testing.assert_close(
            edit.left.double() @ edit.right.double(),
            -0.5 * loss / square * exact[name],
            atol=1e-5,
            rtol=1e-3,
        )


def test_damage_is_measured_in_the_metric() -> None:
    toy = Toy()
    descent, _ = toy.run(60)
    expected = 0.0
    for name, edit in descent.edits().items():
        whitened = edit.left.double() @ edit.right.double() @ toy.metrics[name].factor.double()
        expected += toy.metrics[name].scale * float(whitened.square().sum())
    assert descent.damage() == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_edits_are_copies() -> None:
    toy = Toy()
    descent, _ = toy.run(33, fit=2)
    edits = descent.edits()
    before = {name: (e.left.clone(), e.right.clone()) for name, e in edits.items()}
    descent.fit(toy.by_factors(edits), 0.1)
    for name, (left, right) in before.items():
        assert torch.equal(edits[name].left, left)
        assert torch.equal(edits[name].right, right)


def test_descent_is_repeatable_and_leaves_the_random_state_alone() -> None:
    toy = Toy()
    state = torch.get_rng_state()
    first, losses = toy.run(33)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second, again = toy.run(33)
    assert losses == again
    for name, edit in first.edits().items():
        assert torch.equal(edit.left, second.edits()[name].left)


def test_a_gradient_of_zero_moves_nothing() -> None:
    toy = Toy()
    descent = Descent(toy.metrics, SHAPES, 33)
    descent.find(1.0, {name: torch.zeros(shape) for name, shape in SHAPES.items()}, 0.4)
    assert cost(descent.edits()) == 0
