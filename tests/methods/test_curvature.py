"""The memorised part of a weight, against float64 loops over single entries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libortho import CurvatureConfig
from libortho.methods.curvature import leading_products, memorised_part, sink_directions


def moment(width: int, samples: int = 40) -> Tensor:
    x = torch.randn(samples, width, dtype=torch.float64) * torch.logspace(0, -2, width)
    return x.T @ x / samples


# -- which products --------------------------------------------------------------


@given(
    rows=st.lists(st.floats(0, 8, width=16), min_size=1, max_size=6),
    columns=st.lists(st.floats(0, 8, width=16), min_size=1, max_size=6),
    share=st.floats(0.01, 1.0),
)
def test_the_fewest_products_that_make_up_the_share(rows, columns, share: float) -> None:
    row, column = torch.tensor(rows).double(), torch.tensor(columns).double()
    products = torch.outer(row, column)
    total = float(products.sum())
    if total == 0:
        with pytest.raises(ValueError, match="no curvature"):
            leading_products(row, column, share)
        return
    kept = leading_products(row, column, share)
    assert kept.shape == products.shape
    taken, left = products[kept], products[~kept]
    assert float(taken.sum()) >= share * total * (1 - 1e-9)
    if len(left):
        assert float(left.max()) <= float(taken.min())
    # Without its smallest products (all that are equal) the share would not be reached.
    smaller = taken[taken > taken.min() * (1 + 1e-9)]
    assert float(smaller.sum()) < share * total * (1 + 1e-9)


def test_products_are_taken_from_the_largest() -> None:
    kept = leading_products(torch.tensor([1.0, 10.0]), torch.tensor([1.0, 3.0, 2.0]), 0.75)
    # 1 3 2 / 10 30 20: 30 + 20 = 50 of 66 is enough
    assert kept.tolist() == [[False, False, False], [False, True, True]]


def test_a_share_of_everything_keeps_everything() -> None:
    assert leading_products(torch.rand(5), torch.rand(7), 1.0).all()


# -- the memorised part ----------------------------------------------------------


def directly(weight: Tensor, inputs: Tensor, outputs: Tensor, share: float) -> Tensor:
    """Entry by entry: sort all mu_j * lambda_i, keep from the largest on."""
    lam, v_a = torch.linalg.eigh(inputs)
    mu, v_g = torch.linalg.eigh(outputs)
    rotated = v_g.T @ weight @ v_a
    entries = sorted(
        ((float(mu[j] * lam[i]), j, i) for j in range(len(mu)) for i in range(len(lam))),
        reverse=True,
    )
    total, mass = sum(p for p, _, _ in entries), 0.0
    for product, j, i in entries:
        if mass >= share * total:
            break
        mass += product
        rotated[j, i] = 0.0
    return v_g @ rotated @ v_a.T


@pytest.mark.parametrize("shape", [(9, 7), (5, 12)])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_memorised_part(shape: tuple[int, int], share: float) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    inputs, outputs = moment(shape[1]), moment(shape[0])
    found = memorised_part(weight, inputs, outputs, share)
    expected = directly(weight, inputs, outputs, share)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    assert 0 < float(expected.norm()) < float(weight.norm())
    # the scale of the loss, or of the inputs, is no matter
    scaled = memorised_part(weight, 100 * inputs, 1e-3 * outputs, share)
    torch.testing.assert_close(scaled, expected, atol=1e-10, rtol=1e-8)
    single = memorised_part(weight.bfloat16().float(), inputs.float(), outputs.float(), share)
    assert single.dtype == torch.float32
    again = directly(weight.bfloat16().double(), inputs, outputs, share)
    torch.testing.assert_close(single.double(), again, atol=1e-3, rtol=1e-2)


def test_what_the_loss_does_not_depend_on_is_memorised_and_only_that() -> None:
    # Two inputs and one output take part; the rest of the weight is memorised.
    inputs, outputs = torch.zeros(4, 4), torch.zeros(3, 3)
    inputs[0, 0], inputs[1, 1], outputs[2, 2] = 2.0, 1.0, 5.0
    weight = torch.randn(3, 4)
    expected = weight.clone()
    expected[2, :2] = 0
    torch.testing.assert_close(memorised_part(weight, inputs, outputs, 0.99), expected)
    expected[2, 1] = weight[2, 1]  # 10 of 15 are enough for 0.6
    torch.testing.assert_close(memorised_part(weight, inputs, outputs, 0.6), expected)


def test_no_curvature_at_all() -> None:
    with pytest.raises(ValueError, match="no curvature"):
        memorised_part(torch.randn(3, 4), torch.zeros(4, 4), torch.eye(3), 0.8)


# -- the attention sink ----------------------------------------------------------


def test_sink_directions() -> None:
    body = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
    first = torch.diag(torch.tensor([3.0, 1.0, 900.0, 0.1]))
    found = sink_directions(first, body)
    torch.testing.assert_close(found.abs(), torch.eye(4)[:, [2]])
    assert sink_directions(torch.zeros(4, 4), body).shape == (4, 0)


def test_rounding_is_no_sink() -> None:
    """Activations of thousands in two columns, as large models have, beside ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 512, generator=generator) * 0.02
    x[:, 5] += 3000 + 200 * torch.randn(100, generator=generator)
    x[:, 7] += 900 + 50 * torch.randn(100, generator=generator)
    ordinary = torch.randn(2000, 512, generator=generator) * 0.1
    found = sink_directions(x.T @ x / len(x), ordinary.T @ ordinary / len(ordinary))
    assert found.dtype == torch.float32
    assert found.shape == (512, 2)
    torch.testing.assert_close(found[[5, 7]].square().sum(), torch.tensor(2.0))


def test_the_memorised_part_does_not_respond_to_the_sink() -> None:
    weight, body, outputs = torch.randn(9, 7), moment(7).float(), moment(9).float()
    x = 1e3 * torch.randn(7)
    sink = sink_directions(torch.outer(x, x), body)
    assert sink.shape == (7, 1)
    found = memorised_part(weight, body, outputs, 0.8, sink)
    assert (found @ x).norm() < 1e-4 * (weight @ x).norm()
    # Beside it, all is as if inputs had no component along it.
    unit = (x / x.norm()).double()
    away = torch.eye(7, dtype=torch.float64) - torch.outer(unit, unit)
    expected = directly(weight.double() @ away, away @ body.double() @ away, outputs.double(), 0.8)
    torch.testing.assert_close(found.double(), expected @ away, atol=1e-3, rtol=1e-2)


def test_no_sink_changes_nothing() -> None:
    weight, body, outputs = torch.randn(9, 7), moment(7).float(), moment(9).float()
    with_none = memorised_part(weight, body, outputs, 0.8, torch.zeros(7, 0))
    torch.testing.assert_close(with_none, memorised_part(weight, body, outputs, 0.8))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ortho_ratio", 0.0, ValueError),
        ("kept_mass", 0.0, ValueError),
        ("kept_mass", 1.01, ValueError),
        ("kept_mass", math.nan, ValueError),
        ("kept_mass", True, TypeError),
        ("ortho_dtype", "int8", ValueError),
    ],
)
def test_config_errors_name_the_field(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=field):
        CurvatureConfig(**{field: value})
