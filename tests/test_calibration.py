"""Second moments against a direct float64 sum, one unpadded sequence at a time."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from libortho.calibration import Moments, mean_squares, second_moments
from libortho.data.tokens import Tokens
from libortho.gram import Gram
from libortho.linear import select_linear

LENGTHS = [3, 5, 12, 7, 7, 4, 30]


def inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], item: Tokens) -> dict:
    """Each layer's inputs for one sequence: name -> list of (tokens, d) float64, one a call."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2).double())
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([item.ids]))
    for handle in handles:
        handle.remove()
    return found


@dataclass
class Sums:
    """What `Moments` holds, as plain matrices."""

    body: Tensor
    first: Tensor
    tokens: float = 0.0
    sequences: int = 0


def direct(model, layers, items: Sequence[Tokens], weights=None) -> dict[str, Sums]:
    result = {}
    for name, layer in layers.items():
        width = inputs_of(model, {name: layer}, items[0])[name][0].shape[1]
        result[name] = Sums(*(torch.zeros(2, width, width, dtype=torch.float64)))
    for index, item in enumerate(items):
        for name, calls in inputs_of(model, layers, item).items():
            m = result[name]
            for x in calls:
                for position in range(len(item.ids)):
                    outer = torch.outer(x[position], x[position])
                    if weights is None:
                        if position == 0:
                            m.first += outer
                            m.sequences += 1
                        else:
                            m.body += outer
                            m.tokens += 1
                    elif item.prompt - 1 <= position < len(item.ids) - 1 and position > 0:
                        weight = float(weights[index][position - item.prompt + 1])
                        m.body += weight * outer
                        m.tokens += weight
    return result


def assert_close(found: Mapping[str, Moments], expected: Mapping[str, Sums]) -> None:
    assert set(found) == set(expected)
    for name, m in found.items():
        other = expected[name]
        assert m.tokens == pytest.approx(other.tokens, rel=1e-5)
        assert m.sequences == other.sequences
        for mine, theirs in ((m.body.dense(), other.body), (m.first.dense(), other.first)):
            scale = float(theirs.diagonal().mean())
            torch.testing.assert_close(mine.double(), theirs, atol=1e-4 * scale, rtol=1e-4)


def test_every_position(family, random_tokens) -> None:
    model = family.build()
    layers = select_linear(model, (family.mlp, *family.attention))
    items = random_tokens(LENGTHS)
    found = second_moments(model, layers, items)
    assert_close(found, direct(model, layers, items))
    m = found[next(iter(layers))]
    assert (m.tokens, m.sequences) == (sum(LENGTHS) - len(LENGTHS), len(LENGTHS))


@pytest.mark.parametrize("prompt", [1, 2])
def test_weighted_predicting_positions(tiny_llama, random_tokens, prompt: int) -> None:
    model = tiny_llama()
    layers = select_linear(model, ("down_proj", "q_proj"))
    items = random_tokens([n + 1 for n in LENGTHS], prompt=prompt)
    weights = [torch.rand(item.targets) for item in items]
    weights[2][3] = 0.0
    found = second_moments(model, layers, items, weights=weights)
    assert_close(found, direct(model, layers, items, weights))
    assert all(m.sequences == 0 and not m.first.dense().any() for m in found.values())


def test_mean_keeps_first_positions_apart() -> None:
    body, first = torch.eye(2) * 6, torch.ones(2, 2) * 8
    m = Moments(Gram.of(body), 3.0, Gram.of(first), 4.0)
    torch.testing.assert_close(m.mean().dense(), torch.tensor([[4.0, 2.0], [2.0, 4.0]]))
    nothing = Moments.zeros(2, torch.device("cpu")).mean()
    assert torch.equal(nothing.dense(), torch.zeros(2, 2))


def test_size_does_not_depend_on_the_text(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    done: list[int] = []
    alive: list[int] = []

    def count_activations(*_: object) -> None:
        alive.append(
            sum(type(o) is Tensor and o.dim() == 3 and o.shape[-1] == 64 for o in gc.get_objects())
        )

    handle = layers["model.layers.0.mlp.down_proj"].register_forward_pre_hook(count_activations)
    many = second_moments(model, layers, random_tokens([60] * 80), tick=done.append)
    handle.remove()
    assert sum(done) == 80
    assert len(done) == len(alive) > 3
    assert max(alive[1:]) == min(alive[1:])  # no batch's activations outlive it
    few = second_moments(model, layers, random_tokens([3]))
    for name, m in many.items():
        assert m.body.dense().shape == m.first.dense().shape == (64, 64)
        assert few[name].body.dense().shape == (64, 64)
        assert m.body.dense().dtype == torch.float32


def test_repeating_a_text_changes_no_mean(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    items = random_tokens(LENGTHS)
    once, thrice = (second_moments(model, layers, items * n) for n in (1, 3))
    for name in layers:
        torch.testing.assert_close(once[name].mean().dense(), thrice[name].mean().dense())


def test_sets_of_different_sizes_average_in_one_sum(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    sets = [random_tokens([5] * 4), random_tokens([9, 30, 12], seed=1), random_tokens([7], seed=2)]
    expected = {name: torch.zeros(64, 64, dtype=torch.float64) for name in layers}
    total: dict[str, Moments] = {}
    before = (1, 1)
    for items in sets:
        for name, m in direct(model, layers, items).items():
            expected[name] += (m.body / m.tokens + m.first / m.sequences) / len(sets)
        size = (sum(len(item.ids) - 1 for item in items), len(items))
        for m in total.values():
            m.weigh_(size[0] / before[0], size[1] / before[1])
        total, before = second_moments(model, layers, items, into=total), size
    for name, m in total.items():
        torch.testing.assert_close(m.mean().dense().double(), expected[name], rtol=1e-4, atol=1e-5)


def test_a_layer_in_two_places_sees_both_inputs(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    layers = select_linear(model, "down_proj")
    items = random_tokens(LENGTHS)
    assert_close(second_moments(model, layers, items), direct(model, layers, items))


def test_leaves_the_model_as_it_was(tiny_llama, random_tokens, snapshot) -> None:
    model = tiny_llama().requires_grad_(True)
    before = snapshot(model)
    found = second_moments(model, select_linear(model, "down_proj"), random_tokens(LENGTHS))
    after = snapshot(model)
    assert (after["flags"], after["grads"]) == (before["flags"], before["grads"])
    assert not any(m.body.dense().requires_grad for m in found.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(tiny_llama, random_tokens, value: float) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    layers = select_linear(model, "down_proj")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: .*NaN or Inf"):
        second_moments(model, layers, random_tokens(LENGTHS))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_sees_nothing(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="elsewhere"):
        second_moments(model, {"elsewhere": nn.Linear(3, 3)}, random_tokens(LENGTHS))


def test_token_beyond_the_vocabulary(tiny_llama) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"64.*vocabulary of 64"):
        second_moments(model, select_linear(model, "down_proj"), [Tokens((1, 64, 3))])


def test_mean_squares_are_the_moments_diagonal(family, random_tokens) -> None:
    model = family.build()
    items = random_tokens(LENGTHS, prompt=2)
    layers = select_linear(model, (family.mlp, family.attention[0]))
    some = dict(list(layers.items())[1:])
    weights = [torch.ones(item.targets) for item in items]
    moments = direct(model, some, items, weights)
    rows = {name: torch.randn(3, m.body.shape[0]) for name, m in moments.items()}
    found = mean_squares(model, layers, rows, items)
    assert list(found) == list(some)
    for name, values in found.items():
        r = rows[name].double()
        expected = (r @ (moments[name].body / moments[name].tokens) @ r.T).diagonal()
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)
