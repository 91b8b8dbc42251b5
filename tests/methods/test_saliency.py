"""The score, the choice of entries and the sparse edit, against dense and float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libortho import SaliencyConfig
from libortho.methods.saliency import MaskedDescent, SparseEdit, saliency, select_entries

SHAPES = {"a": (9, 7), "b": (5, 12), "c": (1, 3)}


# -- the choice ------------------------------------------------------------------


def test_score() -> None:
    gradient, fisher = torch.randn(4, 5), torch.rand(4, 5)
    found = saliency(gradient, fisher, 0.2)
    for i in range(4):
        for j in range(5):
            expected = abs(float(gradient[i, j])) / math.sqrt(float(fisher[i, j]) + 0.2)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5)


@given(
    values=st.lists(st.integers(0, 6), min_size=126, max_size=126), count=st.integers(1, 126)
)  # few values: many ties
def test_takes_exactly_the_best(values: list[int], count: int) -> None:
    flat = torch.tensor(values, dtype=torch.float32)
    parts = flat.split([63, 60, 3])
    scores = {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}
    entries = select_entries(scores, count)
    assert list(entries) == list(scores)
    assert sum(index.numel() for index in entries.values()) == count
    taken, left = [], []
    for name, index in entries.items():
        assert index.dtype == torch.int64
        assert index.tolist() == sorted(set(index.tolist()))
        mask = torch.zeros(scores[name].numel(), dtype=torch.bool)
        mask[index] = True
        taken.append(scores[name].flatten()[mask])
        left.append(scores[name].flatten()[~mask])
    taken, left = torch.cat(taken), torch.cat(left)
    assert taken.sort().values.tolist() == flat.sort().values[len(flat) - count :].tolist()
    assert not len(left) or left.max() <= taken.min()


def test_one_threshold_over_all_layers() -> None:
    scores = {"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([[4.0], [3.0], [2.0]])}
    entries = select_entries(scores, 3)
    assert {name: index.tolist() for name, index in entries.items()} == {"a": [0], "b": [0, 1]}
    assert {n: i.tolist() for n, i in select_entries(scores, 1).items()} == {"a": [0], "b": []}


@pytest.mark.parametrize("count", [0, -1, 6])
def test_too_many_or_none(count: int) -> None:
    with pytest.raises(ValueError, match=f"^{count} of 5 entries"):
        select_entries({"a": torch.ones(1, 5)}, count)


# -- the edit --------------------------------------------------------------------


def random_edit(shape: tuple[int, int], count: int) -> tuple[SparseEdit, Tensor]:
    index = torch.randperm(shape[0] * shape[1])[:count].sort().values
    edit = SparseEdit(index, torch.randn(count), shape)
    dense = torch.zeros(shape)
    for flat, value in zip(index.tolist(), edit.values.tolist(), strict=True):
        dense[flat // shape[1], flat % shape[1]] = value
    return edit, dense


@pytest.mark.parametrize("shape", [(9, 7), (1, 12), (41, 1)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_the_dense_product(shape: tuple[int, int], share: float, dtype) -> None:
    edit, dense = random_edit(shape, round(share * shape[0] * shape[1]))
    assert edit.empty == (share == 0.0)
    x = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
    seed = torch.randn(2, 3, shape[0], dtype=dtype)
    y = edit.output(x)
    (gradient,) = torch.autograd.grad(y, x, seed)
    assert y.dtype == dtype
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (0.05, 0.02)
    torch.testing.assert_close(y.float(), x.float() @ dense.T, atol=atol, rtol=rtol)
    torch.testing.assert_close(gradient.float(), seed.float() @ dense, atol=atol, rtol=rtol)


def test_dense_forms_of_an_edit() -> None:
    edit, dense = random_edit((9, 7), 20)
    weight = torch.randn(9, 7, dtype=torch.bfloat16)
    before = weight.clone()
    torch.testing.assert_close(edit.added_to(weight), weight.float() + dense)
    assert torch.equal(edit.mask(), dense != 0)
    assert torch.equal(weight, before)
    # also where the weight is not contiguous, as a Conv1D's is not
    torch.testing.assert_close(edit.added_to(weight.T.contiguous().T), weight.float() + dense)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_part_of_the_way(share: float) -> None:
    edit, dense = random_edit((9, 7), 20)
    other = SparseEdit(edit.index, torch.randn(20), edit.shape)
    zero = torch.zeros(9, 7)
    expected = dense + share * (other.added_to(zero) - dense)
    torch.testing.assert_close(edit.toward(other, share).added_to(zero), expected)
    assert edit.meets(other)


# -- the steps -------------------------------------------------------------------


def descent(rate: float = 0.1) -> tuple[MaskedDescent, dict[str, Tensor], dict[str, Tensor]]:
    weights = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    entries = {"a": torch.tensor([3, 8, 60]), "b": torch.tensor([0]), "c": torch.tensor([]).long()}
    return MaskedDescent(weights, entries, rate), weights, entries


def test_first_step_is_a_share_of_the_chosen_weights() -> None:
    steps, weights, entries = descent(0.1)
    assert all(not e.values.any() for e in steps.edits().values())
    gradients = {name: torch.randn(len(index)) for name, index in entries.items()}
    steps.step(gradients)
    chosen = torch.cat([weights[n].double().flatten()[i] for n, i in entries.items()])
    length = 0.1 * float(chosen.square().mean().sqrt())
    for name, edit in steps.edits().items():
        assert edit.values.dtype == torch.float32
        assert torch.equal(edit.index, entries[name])
        torch.testing.assert_close(edit.values, -length * gradients[name].sign())


def test_small_steps_are_not_lost_to_the_dtype_of_the_model() -> None:
    steps, _, entries = descent(1e-5)
    for _ in range(50):
        steps.step({name: torch.ones(len(index)) for name, index in entries.items()})
    moved = steps.edits()["a"].values
    steps.step({name: torch.ones(len(index)) for name, index in entries.items()})
    assert (steps.edits()["a"].values < moved).all()


def test_edits_are_copies() -> None:
    steps, _, entries = descent()
    steps.step({name: torch.ones(len(index)) for name, index in entries.items()})
    edits = steps.edits()
    before = edits["a"].values.clone()
    steps.step({name: torch.ones(len(index)) for name, index in entries.items()})
    assert torch.equal(edits["a"].values, before)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ortho_ratio", 0.0, ValueError),
        ("ortho_ratio", "1%", TypeError),
        ("damping", 0.0, ValueError),
        ("steps", 0, ValueError),
        ("steps", 1.5, ValueError),
        ("rate", math.nan, ValueError),
        ("retain_weight", -0.1, ValueError),
        ("retain_tokens", 0, ValueError),
        ("tolerance", 1.5, ValueError),
        ("ortho_dtype", "int8", ValueError),
        ("target_nll", 0.0, ValueError),
    ],
)
def test_config_errors_name_the_field(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=field):
        SaliencyConfig(**{field: value})
