"""The retain metric and the budget, against float64 formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_layers import SHAPES, moment

from libortho.gram import Gram
from libortho.methods.edits import allocate, parameter_budget, retain_metric


@pytest.mark.parametrize("samples", [3, 40])  # rank-deficient, and not
def test_metric_factors_the_ridged_moment(samples: int) -> None:
    m = moment(7, samples)
    m = (m + m.T) / 2  # a product need not be symmetric to the last bit, and `Gram.dense` is
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
