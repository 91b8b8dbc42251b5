"""The edit in closed form, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_layers import SHAPES, cost, moment

from libortho import linalg
from libortho.gram import Gram
from libortho.methods.edits import LowRankEdit, retain_metric
from libortho.methods.projection import Projection


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
