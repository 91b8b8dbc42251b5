"""The retain metric, the budget and the two ways to find an edit, against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libortho import GeometricConfig, linalg
from libortho.gram import Gram
from libortho.methods.descent import Descent
from libortho.methods.edits import LowRankEdit, Metric, allocate, parameter_budget, retain_metric
from libortho.methods.projection import Projection

SHAPES = {"a": (9, 7), "b": (5, 12)}


def moment(width: int, samples: int = 40) -> Tensor:
    x = torch.randn(samples, width)
    return x.T @ x / samples


def cost(edits: dict[str, LowRankEdit]) -> int:
    return sum(e.left.numel() + e.right.numel() for e in edits.values())


# -- the metric ------------------------------------------------------------------


@pytest.mark.parametrize("samples", [3, 40])  # rank-deficient, and not
def test_metric_factors_the_ridged_moment(samples: int) -> None:
    m = moment(7, samples)
    before = m.clone()
    metric = retain_metric(Gram.of(m), 0.1, 2.5)
    expected = m.double() + 0.1 * m.double().diagonal().mean() * torch.eye(7)
    factor = metric.factor.double()
    torch.testing.assert_close(factor @ factor.T, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(factor, factor.tril())
    assert metric.scale == 2.5
    assert torch.equal(m, before)  # narrow: factored in a copy


def test_metric_survives_an_attention_sink() -> None:
    m = moment(7)
    m[0, 0] += 1e9
    assert torch.isfinite(retain_metric(Gram.of(m), 1e-3).factor).all()


def test_whitening_is_a_change_of_coordinates() -> None:
    metric = retain_metric(Gram.of(moment(7)), 0.1)
    factor = metric.factor.double()
    gradient, rows = torch.randn(5, 7), torch.randn(3, 7)
    torch.testing.assert_close(
        metric.whiten_gradient(gradient).double() @ factor.T,
        gradient.double(),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        metric.unwhiten_rows(rows).double() @ factor, rows.double(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 3), torch.full((3, 3), float("nan")), torch.eye(3) * float("inf")]
)
def test_metric_of_nothing(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a\.b: .*mean square"):
        retain_metric(Gram.of(bad), 0.1, name="a.b")


# -- the budget ------------------------------------------------------------------


def test_parameter_budget() -> None:
    assert parameter_budget(SHAPES, 0.1) == 12  # of 63 + 60
    assert parameter_budget(SHAPES, 1.0) == 123
    assert parameter_budget(SHAPES, 1e-6) == 0


@given(
    strengths=st.dictionaries(
        st.sampled_from(["a", "b"]), st.lists(st.floats(0, 100), max_size=6), min_size=1
    ),
    budget=st.integers(0, 120),
)
def test_allocate_takes_the_strongest_that_it_can_pay(
    strengths: dict[str, list[float]], budget: int
) -> None:
    strengths = {name: sorted(values, reverse=True) for name, values in strengths.items()}
    ranks = allocate({n: torch.tensor(v) for n, v in strengths.items()}, SHAPES, budget)
    assert set(ranks) == set(strengths)
    assert sum(rank * sum(SHAPES[name]) for name, rank in ranks.items()) <= budget
    taken = [v for name, values in strengths.items() for v in values[: ranks[name]]]
    left = [v for name, values in strengths.items() for v in values[ranks[name] :]]
    assert all(v > 0 for v in taken)
    if taken and left:
        assert torch.tensor(min(taken)) >= torch.tensor(max(left))


def test_allocate_one_threshold_over_all_layers() -> None:
    strengths = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0, 2.0])}
    assert allocate(strengths, SHAPES, 16 + 17 + 17) == {"a": 1, "b": 2}
    assert allocate(strengths, SHAPES, 10**6) == {"a": 2, "b": 3}
    assert allocate(strengths, SHAPES, 15) == {"a": 0, "b": 0}


# -- the closed form -------------------------------------------------------------


def closed_form(weight: Tensor, retain: Tensor, forget: Tensor, ridge: float, rank: int) -> Tensor:
    retain, forget = retain.double(), forget.double()
    metric = retain + ridge * retain.diagonal().mean() * torch.eye(len(retain))
    factor = torch.linalg.cholesky(metric)
    inverse = torch.linalg.inv(factor)
    _, vectors = torch.linalg.eigh(inverse @ forget @ inverse.T)
    u = vectors[:, -rank:]
    return -weight.double() @ factor @ u @ u.T @ inverse


def projection(
    weights: dict[str, Tensor],
    retain: dict[str, Tensor],
    forget: dict[str, Gram],
    ridge: float,
    budget: int,
) -> dict[str, LowRankEdit]:
    metrics = {name: retain_metric(Gram.of(m.clone()), ridge) for name, m in retain.items()}
    return Projection(weights, metrics, forget, budget).edits(budget)


@pytest.mark.parametrize("rank", [1, 3])
def test_projection_is_the_closed_form(rank: int) -> None:
    weight, retain, forget = torch.randn(9, 7), moment(7), moment(7, 5)
    edit = projection({"a": weight}, {"a": retain}, {"a": Gram.of(forget.clone())}, 0.3, rank * 16)[
        "a"
    ]
    assert edit.rank == rank
    expected = closed_form(weight, retain, forget, 0.3, rank)
    torch.testing.assert_close(
        edit.left.double() @ edit.right.double(), expected, atol=1e-4, rtol=1e-3
    )


def test_projection_silences_what_only_the_forget_set_uses() -> None:
    # The forget inputs lie along one axis that the retain inputs never use.
    weight = torch.randn(9, 7)
    retain, forget = moment(7), torch.zeros(7, 7)
    retain[0] = retain[:, 0] = 0
    forget[0, 0] = 1.0
    edits = projection({"a": weight}, {"a": retain}, {"a": Gram.of(forget)}, 1e-4, 16)
    edited = weight + edits["a"].left @ edits["a"].right
    assert edited[:, 0].abs().max() < 1e-4
    torch.testing.assert_close(edited[:, 1:], weight[:, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_projection_from_rows_is_that_from_the_moment(tokens: int) -> None:
    width, budget = 40, 6 * 49
    weights = {"a": torch.randn(9, width)}
    rows = torch.randn(tokens, width) * torch.logspace(0, -2, width) / tokens**0.5
    as_rows = Gram(width, rows.device)
    as_rows.add(rows)
    assert as_rows.rows is not None
    as_matrix = Gram.of(rows.T @ rows)
    retain = {"a": moment(width, 90)}
    one, other = (
        projection(weights, retain, {"a": forget}, 0.1, budget)["a"]
        for forget in (as_rows, as_matrix)
    )
    assert one.rank == min(6, tokens)  # a forget set of few tokens has no more directions
    rank = one.rank
    torch.testing.assert_close(
        one.left @ one.right, other.left[:, :rank] @ other.right[:rank], atol=1e-3, rtol=1e-3
    )


def test_a_wide_layer_is_factored_in_fp32_and_edited_as_well(monkeypatch) -> None:
    # Ill-conditioned: columns over four orders of magnitude, and a sink.
    width, weight = 300, torch.randn(64, 300)
    x = torch.randn(900, width) * torch.logspace(0, -4, width)
    x[0, :20] = 1e3
    retain, forget = x.T @ x / 900, torch.randn(50, width) * torch.logspace(-1, -3, width)
    edits = []
    for limit in (width, width - 1):
        monkeypatch.setattr(linalg, "WIDE", limit)
        held = Gram(width, x.device)
        held.add(forget)
        edits.append(projection({"a": weight}, {"a": retain}, {"a": held}, 0.1, 8 * 364)["a"])
    assert edits[0].rank == edits[1].rank == 8
    exact, mine = (e.left.double() @ e.right.double() for e in edits)
    factor = torch.linalg.cholesky(
        retain.double() + 0.1 * retain.diagonal().double().mean() * torch.eye(width)
    )
    # By the two sides' own measure: retain damage, and what is taken from the forget inputs.
    for metric in (factor, forget.T.double()):
        assert float(((mine - exact) @ metric).norm()) < 1e-3 * float((exact @ metric).norm())


def test_projection_finds_its_directions_once() -> None:
    retain = {name: moment(shape[1]) for name, shape in SHAPES.items()}
    metrics = {name: retain_metric(Gram.of(m), 0.1) for name, m in retain.items()}
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    forget = {name: Gram.of(moment(shape[1], 4)) for name, shape in SHAPES.items()}
    found = Projection(weights, metrics, forget, 100)
    for budget in (17, 50, 100):
        again = Projection(weights, metrics, forget, budget).edits(budget)
        for name, edit in found.edits(budget).items():
            torch.testing.assert_close(edit.left @ edit.right, again[name].left @ again[name].right)
    with pytest.raises(ValueError, match=r"budget=101: .*100"):
        found.edits(101)


@pytest.mark.parametrize("budget", [0, 15, 17, 40, 100])
def test_projection_keeps_the_budget(budget: int) -> None:
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    retain = {name: moment(shape[1]) for name, shape in SHAPES.items()}
    forget = {name: Gram.of(moment(shape[1], 4)) for name, shape in SHAPES.items()}
    edits = projection(weights, retain, forget, 0.1, budget)
    assert list(edits) == list(SHAPES)
    assert cost(edits) <= budget
    assert (cost(edits) > 0) == (budget >= 17)
    for name, shape in SHAPES.items():
        assert (edits[name].left @ edits[name].right).shape == shape


# -- descent ---------------------------------------------------------------------


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


# -- the config ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ortho_ratio", 0.0, ValueError),
        ("ortho_ratio", 1.01, ValueError),
        ("ortho_ratio", math.nan, ValueError),
        ("ortho_ratio", "1%", TypeError),
        ("edit", "ascent", ValueError),
        ("ridge", 0.0, ValueError),
        ("ridge", math.inf, ValueError),
        ("step", -1.0, ValueError),
        ("tolerance", 1.5, ValueError),
        ("ortho_dtype", "int8", ValueError),
        ("target_nll", 0.0, ValueError),
        ("target_nll", True, TypeError),
    ],
)
def test_config_errors_name_the_field(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=field):
        GeometricConfig(**{field: value})
