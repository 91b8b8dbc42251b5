"""Fisher information in its three forms, against float64 sums over unpadded sequences."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from libortho import gradients
from libortho.calibration import second_moments
from libortho.data.tokens import Tokens, batches
from libortho.gradients import fisher_diagonal, kronecker_factors, output_sensitivity
from libortho.linear import is_conv1d, select_linear
from libortho.scoring import predicted_logits

LENGTHS = [4, 12, 7, 9]


def log_p(model: nn.Module, item: Tokens) -> Tensor:
    """(targets, vocabulary) log-probabilities of one unpadded sequence, by the whole model."""
    logits = model(input_ids=torch.tensor([item.ids])).logits[0, item.prompt - 1 : -1]
    return logits.log_softmax(dim=-1)


def sampled_losses(
    model: nn.Module, items: Sequence[Tokens], tokens_per_batch: int, seed: int
) -> Iterator[tuple[nn.Module, Tensor]]:
    """A float64 copy and its loss for each batch, with the very labels that the seed gives."""
    twin = copy.deepcopy(model).double().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches(items, tokens_per_batch):
        with torch.no_grad():
            p = predicted_logits(model, batch).softmax(dim=1)
        labels = torch.multinomial(p, 1, generator=generator).squeeze(1).split(batch.counts)
        yield (
            twin,
            -sum(
                log_p(twin, items[i]).gather(1, own.unsqueeze(1)).sum()
                for i, own in zip(batch.index, labels, strict=True)
            ),
        )


# -- the diagonal ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fisher_is_the_mean_square_of_batch_gradients(families, random_tokens, name: str) -> None:
    family = families[name]
    model = family.build()
    layers = select_linear(model, (family.mlp, *family.attention))
    items = random_tokens([30, 40, 60, 70, 90, 9])
    found = fisher_diagonal(model, layers, items, seed=5)
    total: dict[str, Tensor] = {}
    passes = 0
    for twin, loss in sampled_losses(model, items, gradients.FISHER_BATCH_TOKENS, 5):
        passes += 1
        weights = [twin.get_submodule(n).weight for n in layers]
        for n, gradient in zip(layers, torch.autograd.grad(loss, weights), strict=True):
            flat = gradient.T if is_conv1d(layers[n]) else gradient
            total[n] = total.get(n, 0) + flat.square()
    assert passes > 2
    tokens = sum(item.targets for item in items)
    for n, square in total.items():
        assert found[n].dtype == torch.float32
        expected = square / tokens
        torch.testing.assert_close(
            found[n].double(), expected, atol=1e-5 * float(expected.max()), rtol=1e-3
        )


def test_fisher_estimates_the_sum_over_labels(tiny_llama) -> None:
    # One predicted token: the expectation over labels can be summed exactly. That gradients are
    # added up over a batch before they are squared must not matter.
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    item = Tokens((1, 5, 9, 20, 7), 4)
    twin = copy.deepcopy(model).double()
    weights = [twin.get_submodule(n).weight.requires_grad_(True) for n in layers]
    rows = log_p(twin, item)[0]
    exact = dict.fromkeys(layers, 0.0)
    for label in range(64):
        found = torch.autograd.grad(-rows[label], weights, retain_graph=True)
        for name, gradient in zip(layers, found, strict=True):
            exact[name] += float(rows[label].detach().exp() * gradient.square().sum())
    estimate = fisher_diagonal(model, layers, [item] * 4000)
    for name, value in exact.items():
        assert float(estimate[name].sum()) == pytest.approx(value, rel=0.15)


# -- the two factors -------------------------------------------------------------


def direct_outputs(model: nn.Module, layers: Mapping[str, nn.Module], items, seed: int) -> dict:
    """Sum of g g^T, position by position."""
    sums: dict[str, Tensor] = {}
    for twin, loss in sampled_losses(with_kept_outputs(model, layers), items, 1024, seed):
        loss.backward()
        for name in layers:
            for output in twin.get_submodule(name).kept:
                for g in output.grad.flatten(0, -2):
                    sums[name] = sums.get(name, 0) + torch.outer(g, g)
            twin.get_submodule(name).kept.clear()
    return sums


def with_kept_outputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    twin = copy.deepcopy(model)

    def keep(module, args, output):
        if torch.is_grad_enabled():
            output.retain_grad()
            module.kept.append(output)
        return output

    for name in layers:
        twin.get_submodule(name).kept = []
        twin.get_submodule(name).register_forward_hook(keep)
    return twin


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_kronecker_factors(families, random_tokens, name: str) -> None:
    family = families[name]
    model = family.build()
    layers = select_linear(model, (family.mlp, *family.attention))
    items = random_tokens(LENGTHS)
    found = kronecker_factors(model, layers, items, seed=2)
    expected = direct_outputs(model, layers, items, 2)
    moments = second_moments(model, layers, items)
    for n, factors in found.items():
        assert factors.outputs.dtype == torch.float32
        scale = float(expected[n].diagonal().max())
        torch.testing.assert_close(
            factors.outputs.double(), expected[n], atol=1e-4 * scale, rtol=1e-3
        )
        assert (factors.inputs.tokens, factors.inputs.sequences) == (sum(LENGTHS) - 4, 4)
        torch.testing.assert_close(
            factors.inputs.body.dense(), moments[n].body.dense(), atol=1e-3, rtol=1e-3
        )
        torch.testing.assert_close(
            factors.inputs.first.dense(), moments[n].first.dense(), atol=1e-3, rtol=1e-3
        )


def test_factors_of_a_layer_in_two_places(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    layers = select_linear(model, "down_proj")
    (name,) = layers
    items = random_tokens(LENGTHS)
    found = kronecker_factors(model, layers, items)[name]
    expected = direct_outputs(model, layers, items, 0)[name]
    torch.testing.assert_close(found.outputs.double(), expected, atol=1e-4, rtol=1e-3)
    assert found.inputs.tokens == 2 * (sum(LENGTHS) - 4)


def test_factors_do_not_grow_with_the_text(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    done: list[int] = []
    found = kronecker_factors(model, layers, random_tokens([60] * 40), tick=done.append)
    assert sum(done) == 40
    assert len(done) > 1
    for factors in found.values():
        assert factors.outputs.shape == (32, 32)
        assert factors.inputs.body.dense().shape == (64, 64)
        assert not factors.outputs.requires_grad


# -- the scalar ------------------------------------------------------------------


def test_sensitivity_is_positive_and_repeatable(family, random_tokens) -> None:
    model = family.build()
    layers = select_linear(model, (family.mlp, *family.attention))
    items = random_tokens(LENGTHS)
    state = torch.get_rng_state()
    found = output_sensitivity(model, layers, items, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found) == list(layers)
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert output_sensitivity(model, layers, items, seed=3) == found
    assert output_sensitivity(model, layers, items, seed=4) != found


def test_sensitivity_is_the_mean_squared_gradient(tiny_llama) -> None:
    # One predicted token: the expectation over labels can be summed exactly.
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    item = Tokens((1, 5, 9, 20, 7), 4)
    twin = copy.deepcopy(model).double()
    outputs: dict[str, Tensor] = {}
    for name in layers:

        def keep(module, args, output, name=name):
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        twin.get_submodule(name).register_forward_hook(keep)
    rows = log_p(twin, item)[0]
    exact = dict.fromkeys(layers, 0.0)
    for label in range(64):
        gradients = torch.autograd.grad(-rows[label], list(outputs.values()), retain_graph=True)
        for name, gradient in zip(outputs, gradients, strict=True):
            exact[name] += float(rows[label].detach().exp() * gradient.square().sum())
    found = output_sensitivity(model, layers, [item] * 2000)
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, rel=0.1)


# -- all of them -----------------------------------------------------------------


@pytest.mark.parametrize("function", [fisher_diagonal, kronecker_factors, output_sensitivity])
def test_leaves_the_model_as_it_was(tiny_llama, random_tokens, snapshot, function) -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(True)
    layers = select_linear(model, "down_proj")
    before, state = snapshot(model), torch.get_rng_state()
    with torch.no_grad():  # gradients are wanted here, whatever the caller's mode
        function(model, layers, random_tokens(LENGTHS))
    with pytest.raises(ValueError, match="vocabulary"):
        function(model, layers, [Tokens((1, 99))])
    after = snapshot(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (after["flags"], after["grads"]) == (before["flags"], before["grads"])
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_the_last_batch_leaves_out(tiny_llama, random_tokens) -> None:
    """As a mixture does with most of its experts."""
    model = tiny_llama()
    name = "model.layers.1.mlp.down_proj"
    block = model.get_submodule("model.layers.1.mlp")
    short, long = random_tokens([4, 9])
    whole = block.forward
    block.forward = lambda x: whole(x) if x.shape[1] == 4 else torch.zeros_like(x)
    # Batches of 128 tokens, the shortest sequences first.
    found = fisher_diagonal(model, select_linear(model, "down_proj"), [*[short] * 40, *[long] * 40])
    assert float(found[name].sum()) > 0


@pytest.mark.parametrize("function", [fisher_diagonal, kronecker_factors])
def test_a_layer_without_part_in_the_prediction_is_named(
    tiny_llama, random_tokens, function
) -> None:
    model = tiny_llama()
    layers = {**select_linear(model, "down_proj"), "elsewhere": nn.Linear(3, 3)}
    with pytest.raises(ValueError, match=r"elsewhere \(Linear\) takes no part"):
        function(model, layers, random_tokens(LENGTHS))


def test_activations_that_are_not_finite(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e38
    layers = select_linear(model, "down_proj")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: .*NaN or Inf"):
        kronecker_factors(model, layers, random_tokens(LENGTHS))
