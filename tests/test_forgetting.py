"""Targets, and the loss and gradients by which the base is moved, against plain autograd."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from libortho import forgetting, gradients
from libortho.data.tokens import Tokens
from libortho.forgetting import (
    Target,
    feedback,
    preservation,
    sharpened,
    targets_from_earlier_model,
    targets_from_model_itself,
)
from libortho.linear import is_conv1d, select_linear
from libortho.methods.edits import LowRankEdit
from libortho.methods.saliency import SparseEdit
from libortho.scoring import sequence_nll

LENGTHS = [4, 12, 7, 9]


def random_targets(items: Sequence[Tokens], k: int = 6) -> list[Target]:
    """Distributions over the sequence's own token and k - 1 others."""
    result = []
    for item in items:
        rows = []
        for own in item.ids[item.prompt :]:
            others = torch.randperm(64)
            rows.append(torch.cat((torch.tensor([own]), others[others != own][: k - 1])))
        result.append(Target(torch.stack(rows), torch.rand(item.targets, k).softmax(dim=1)))
    return result


def log_p(model: nn.Module, item: Tokens) -> Tensor:
    """(targets, vocabulary) log-probabilities of one unpadded sequence, by the whole model."""
    logits = model(input_ids=torch.tensor([item.ids])).logits[0, item.prompt - 1 : -1]
    return logits.log_softmax(dim=-1)


def direct_loss(model: nn.Module, items: Sequence[Tokens], targets: Sequence[Target]) -> Tensor:
    """The loss as `Feedback` documents it, from the whole model's logits."""
    total = 0.0
    for item, target in zip(items, targets, strict=True):
        picked = log_p(model, item).gather(1, target.tokens)
        wanted = target.probabilities.to(picked.dtype)
        excess = picked[:, 0].exp().logit() - wanted[:, 0].logit() + forgetting.MARGIN
        total = total + (wanted * (wanted.log() - picked)).sum()
        total = total + forgetting.PRESSURE * excess.clamp_min(0).sum()
    return total / sum(item.targets for item in items)


def random_edits(layers: Mapping[str, nn.Module], rank: int = 2) -> dict[str, LowRankEdit]:
    edits = {}
    for name, layer in layers.items():
        rows, columns = reversed(layer.weight.shape) if is_conv1d(layer) else layer.weight.shape
        edits[name] = LowRankEdit(0.2 * torch.randn(rows, rank), torch.randn(rank, columns))
    return edits


def with_edits(model: nn.Module, edits: Mapping[str, LowRankEdit]) -> nn.Module:
    """A copy whose weights really hold the edits."""
    twin = copy.deepcopy(model)
    for name, edit in edits.items():
        layer = twin.get_submodule(name)
        change = edit.left @ edit.right
        layer.weight.data += change.T if is_conv1d(layer) else change
    return twin


# -- feedback --------------------------------------------------------------------


@pytest.mark.parametrize("edited", [False, True], ids=["as it is", "edited"])
def test_feedback_equals_autograd(family, random_tokens, edited: bool) -> None:
    model = family.build()
    layers = select_linear(model, (family.mlp, *family.attention))
    items = random_tokens(LENGTHS)
    targets = random_targets(items)
    edits = random_edits(layers) if edited else {}
    found = feedback(model, layers, items, targets, edits)

    twin = with_edits(model, edits).double()
    for name in layers:
        twin.get_submodule(name).weight.requires_grad_(True)
    loss = direct_loss(twin, items, targets)
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name in layers:
        layer = twin.get_submodule(name)
        gradient = layer.weight.grad.T if is_conv1d(layer) else layer.weight.grad
        assert gradient.abs().max() > 1e-6
        assert found.gradients[name].dtype == torch.float32
        torch.testing.assert_close(
            found.gradients[name].double(),
            gradient,
            atol=1e-4 * float(gradient.abs().max()),
            rtol=1e-3,
        )
    with torch.no_grad():
        own = [
            log_p(twin, item).gather(1, torch.tensor(item.ids[item.prompt :]).unsqueeze(1))
            for item in items
        ]
    assert found.nll == pytest.approx(-float(torch.cat(own).mean()), rel=1e-4)
    probability = sum(math.exp(float(x.mean())) for x in own) / len(own)
    assert found.probability == pytest.approx(probability, rel=1e-4)


def test_the_whole_loss_has_the_gradient_it_says(tiny_llama, random_tokens) -> None:
    # Whatever the loss is made of: central differences along a random direction.
    model = tiny_llama().double()
    layers = select_linear(model, "down_proj")
    items = random_tokens(LENGTHS)
    targets = random_targets(items)
    edits = random_edits(layers)
    found = feedback(model, layers, items, targets, {})
    size = 3e-3

    def loss(sign: float) -> float:
        moved = {n: LowRankEdit(sign * size * e.left, e.right) for n, e in edits.items()}
        return feedback(model, layers, items, targets, moved).loss

    slope = sum(
        float((g * (edits[n].left @ edits[n].right)).sum()) for n, g in found.gradients.items()
    )
    assert (loss(1) - loss(-1)) / (2 * size) == pytest.approx(slope, rel=1e-2)


def test_feedback_in_several_batches(tiny_llama, random_tokens) -> None:
    model = tiny_llama().double()
    layers = select_linear(model, "down_proj")
    items = random_tokens([60] * 40)  # more than one batch of 1024 tokens
    targets = random_targets(items)
    twin = copy.deepcopy(model)
    for name in layers:
        twin.get_submodule(name).weight.requires_grad_(True)
    loss = direct_loss(twin, items, targets)
    loss.backward()
    found = feedback(model, layers, items, targets, {})
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name in layers:
        torch.testing.assert_close(
            found.gradients[name].double(),
            twin.get_submodule(name).weight.grad,
            atol=1e-6,
            rtol=1e-3,
        )


@pytest.mark.parametrize("by", ["weights", "factors"])
def test_gradients_in_fp16_do_not_underflow(tiny_llama, random_tokens, by) -> None:
    """A mean over thousands of tokens would be too small for fp16 on its way down."""
    items = random_tokens([60] * 40)
    targets = random_targets(items)
    edits = random_edits(select_linear(tiny_llama(), "down_proj"))
    found = []
    for model in (tiny_llama(), tiny_llama().half()):
        model.lm_head.weight.mul_(0.01)  # stands for more of them
        layers = select_linear(model, "down_proj")
        found.append(feedback(model, layers, items, targets, edits, by=by).gradients)
    for name, gradient in found[0].items():
        pair = (gradient, found[1][name])
        for one, other in [pair] if by == "weights" else zip(*pair, strict=True):
            assert (one - other).norm() < 0.02 * one.norm()


def test_feedback_of_a_layer_in_two_places(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    layers = select_linear(model, "down_proj")
    items = random_tokens(LENGTHS)
    targets = random_targets(items)
    found = feedback(model, layers, items, targets, {})
    twin = copy.deepcopy(model)
    (name,) = layers
    weight = twin.get_submodule(name).weight.requires_grad_(True)
    direct_loss(twin, items, targets).backward()
    torch.testing.assert_close(found.gradients[name], weight.grad, atol=1e-6, rtol=1e-3)


def test_divergence_is_zero_at_the_target(tiny_llama, random_tokens, monkeypatch) -> None:
    monkeypatch.setattr(forgetting, "PRESSURE", 0.0)
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    items = random_tokens(LENGTHS)
    targets = targets_from_earlier_model(model, items)
    found = feedback(model, layers, items, targets, {})
    assert found.loss < 1e-5
    assert all(g.abs().max() < 1e-5 for g in found.gradients.values())


def test_edits_of_rank_zero_change_nothing(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    layers = select_linear(model, "down_proj")
    items = random_tokens(LENGTHS)
    targets = random_targets(items)
    plain = feedback(model, layers, items, targets, {})
    zero = feedback(model, layers, items, targets, random_edits(layers, rank=0))
    assert (zero.loss, zero.probability) == (plain.loss, plain.probability)


def test_leaves_the_model_as_it_was(tiny_llama, random_tokens, snapshot) -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(True)
    layers = select_linear(model, "down_proj")
    items = random_tokens(LENGTHS)
    before = snapshot(model)
    with torch.no_grad():  # gradients are wanted here, whatever the caller's mode
        found = feedback(model, layers, items, random_targets(items), random_edits(layers))
        preservation(model, layers, items, random_targets(items), {})
    assert all(g.any() for g in found.gradients.values())
    with pytest.raises(ValueError, match="vocabulary"):
        feedback(model, layers, [Tokens((1, 99))], random_targets([Tokens((1, 9))]), {})
    after = snapshot(model)
    assert (after["flags"], after["grads"]) == (before["flags"], before["grads"])
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_without_part_in_the_prediction_is_named(tiny_llama, random_tokens) -> None:
    model, items = tiny_llama(), random_tokens(LENGTHS)
    layers = {**select_linear(model, "down_proj"), "elsewhere": nn.Linear(3, 3)}
    with pytest.raises(ValueError, match="elsewhere"):
        feedback(model, layers, items, random_targets(items), {})


def test_targets_of_what_is_known_by_heart(tiny_llama, random_tokens) -> None:
    """In fp32 such a token has all of the probability: what is wanted in its place is there yet."""
    model = tiny_llama()
    model.lm_head.weight.mul_(1000)
    ids = list(random_tokens([9])[0].ids[:1])
    while len(ids) < 9:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    item = Tokens(tuple(ids))
    assert float(sequence_nll(model, [item])[0].max()) == 0.0
    for (target,) in (
        targets_from_earlier_model(model, [item]),
        targets_from_model_itself(model, [item], 0.05),
    ):
        ones = torch.ones(item.targets)
        torch.testing.assert_close(target.probabilities.sum(1), ones, atol=1e-5, rtol=0)
        others = model(input_ids=torch.tensor([ids])).logits[0, :-1].topk(2).indices[:, 1]
        assert torch.equal(target.tokens[:, 1], others)
    assert target.answer_probability == pytest.approx(0.05, rel=1e-3)
    layers = select_linear(model, "down_proj")
    found = feedback(model, layers, [item], [target], {})
    assert any(g.norm() > 0 for g in found.gradients.values())


# -- some entries, and what is to be kept ------------------------------------------


def sparse_edits(layers: Mapping[str, nn.Module], count: int = 40) -> dict[str, SparseEdit]:
    edits = {}
    for name, layer in layers.items():
        rows, columns = reversed(layer.weight.shape) if is_conv1d(layer) else layer.weight.shape
        index = torch.randperm(rows * columns)[:count].sort().values
        edits[name] = SparseEdit(index, torch.randn(count), (rows, columns))
    return edits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("loss", ["forget", "keep"])
def test_gradients_of_some_entries_equal_autograd(
    families, random_tokens, name: str, loss: str
) -> None:
    family = families[name]
    model = family.build()
    layers = select_linear(model, (family.mlp, *family.attention))
    items = random_tokens(LENGTHS)
    targets = random_targets(items)
    edits = sparse_edits(layers)
    entries = {n: e.index for n, e in edits.items()}
    measured = feedback if loss == "forget" else functools.partial(preservation, cross_entropy=True)
    found = measured(model, layers, items, targets, edits, entries=entries)

    twin = copy.deepcopy(model).double()
    for n, edit in edits.items():
        change = edit.added_to(torch.zeros(edit.shape)).double()
        layer = twin.get_submodule(n)
        layer.weight.data += change.T if is_conv1d(layer) else change
        layer.weight.requires_grad_(True)
    direct = direct_loss if loss == "forget" else direct_keeping_loss
    expected = direct(twin, items, targets)
    expected.backward()
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for n, edit in edits.items():
        layer = twin.get_submodule(n)
        gradient = layer.weight.grad.T if is_conv1d(layer) else layer.weight.grad
        assert found.gradients[n].dtype == torch.float32
        torch.testing.assert_close(
            found.gradients[n].double(),
            gradient.flatten()[edit.index],
            atol=1e-4 * float(gradient.abs().max()),
            rtol=1e-3,
        )


def direct_keeping_loss(
    model: nn.Module, items: Sequence[Tokens], targets: Sequence[Target]
) -> Tensor:
    """KL(original || model) + cross-entropy, from the whole model's logits."""
    total = 0.0
    for item, target in zip(items, targets, strict=True):
        picked = log_p(model, item).gather(1, target.tokens)
        wanted = target.probabilities.to(picked.dtype)
        total = total + (wanted * (wanted.log() - picked)).sum() - picked[:, 0].sum()
    return total / sum(item.targets for item in items)


# -- targets ---------------------------------------------------------------------


def assert_distributions(targets: Sequence[Target], items: Sequence[Tokens]) -> None:
    for target, item in zip(targets, items, strict=True):
        assert target.tokens[:, 0].tolist() == list(item.ids[item.prompt :])
        assert target.tokens.shape == target.probabilities.shape
        assert (target.probabilities >= 0).all()
        torch.testing.assert_close(target.probabilities.sum(1), torch.ones(item.targets))
        assert all(len(set(row)) == len(row) for row in target.tokens.tolist())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_targets_from_an_earlier_model(tiny_llama, random_tokens, temperature: float) -> None:
    model = tiny_llama()
    items = random_tokens(LENGTHS)
    plain = targets_from_earlier_model(model, items)
    targets = [sharpened(target, temperature) for target in plain]
    assert_distributions(targets, items)
    for target, item in zip(targets, items, strict=True):
        expected = (log_p(model, item) / temperature).softmax(dim=-1)
        torch.testing.assert_close(
            target.probabilities, expected.gather(1, target.tokens), atol=1e-5, rtol=1e-4
        )


def test_an_earlier_model_is_shown_the_context(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    items, context = random_tokens(LENGTHS), random_tokens([5, 6], seed=9)
    targets = targets_from_earlier_model(model, items, context)
    assert_distributions(targets, items)
    lead = context[0].ids + context[1].ids
    for target, item in zip(targets, items, strict=True):
        shown = Tokens(lead + item.ids, len(lead) + item.prompt)
        expected = log_p(model, shown).exp().gather(1, target.tokens)
        torch.testing.assert_close(target.probabilities, expected, atol=1e-5, rtol=1e-4)


def test_targets_keep_the_largest_and_renormalise(tiny_llama, random_tokens, monkeypatch) -> None:
    monkeypatch.setattr("libortho.forgetting.TOP", 4)
    model = tiny_llama()
    items = random_tokens(LENGTHS)
    targets = targets_from_earlier_model(model, items)
    assert_distributions(targets, items)
    for target, item in zip(targets, items, strict=True):
        assert target.tokens.shape == (item.targets, 5)
        p = log_p(model, item).exp()
        own = p.gather(1, target.tokens[:, :1]).squeeze(1)
        torch.testing.assert_close(target.own, own, atol=1e-5, rtol=1e-4)
        largest = p.scatter(1, target.tokens[:, :1], 0.0).topk(4).indices
        assert target.tokens[:, 1:].tolist() == largest.tolist()


@pytest.mark.parametrize("level", [0.3, 0.05, 1e-3])
def test_targets_from_the_model_itself(memorised, level: float) -> None:
    targets = targets_from_model_itself(memorised.model, memorised.forget, level)
    assert_distributions(targets, memorised.forget)
    for target in targets:
        assert target.answer_probability == pytest.approx(level, rel=1e-2)


def test_what_the_prompt_says_keeps_its_probability(memorised) -> None:
    ids = memorised.forget[0].ids
    item = Tokens((1, ids[1], ids[5], *ids[2:]), 3)  # the prompt gives ids[5] away
    (target,) = targets_from_model_itself(memorised.model, [item], 0.01)
    given = item.ids[item.prompt :].index(ids[5])
    expected = log_p(memorised.model, item).exp()[given, ids[5]]
    assert target.own[given] == pytest.approx(float(expected), rel=1e-3)
    assert target.answer_probability == pytest.approx(0.01, rel=1e-2)


def test_a_model_that_knows_less_than_the_level_is_asked_for_nothing(memorised) -> None:
    items = memorised.unseen
    targets = targets_from_model_itself(memorised.model, items, 0.999)
    for target, item in zip(targets, items, strict=True):
        expected = log_p(memorised.model, item).exp().gather(1, target.tokens[:, :1]).squeeze(1)
        torch.testing.assert_close(target.own, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("loss", ["forget", "keep"])
def test_gradients_by_factors_are_those_by_the_weight_in_short(
    families, random_tokens, name: str, loss: str
) -> None:
    family = families[name]
    model, items = family.build(), random_tokens(LENGTHS)
    layers = select_linear(model, (family.mlp, *family.attention))
    targets, edits = random_targets(items), random_edits(layers)
    empty = next(iter(layers))
    rows, columns = edits[empty].left.shape[0], edits[empty].right.shape[1]
    edits[empty] = LowRankEdit(torch.zeros(rows, 0), torch.zeros(0, columns))
    measured = feedback if loss == "forget" else preservation
    whole = measured(model, layers, items, targets, edits)
    short = measured(model, layers, items, targets, edits, by="factors")
    assert short.loss == pytest.approx(whole.loss, rel=1e-5)
    assert short.probability == pytest.approx(whole.probability, rel=1e-5)
    assert set(short.gradients) == set(layers) - {empty}
    for n, (left, right) in short.gradients.items():
        by_weight = whole.gradients[n]
        torch.testing.assert_close(left, by_weight @ edits[n].right.T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(right, edits[n].left.T @ by_weight, rtol=1e-3, atol=1e-6)


def test_edits_for_a_forward_pass_alone(tiny_llama, random_tokens) -> None:
    model, items = tiny_llama(), random_tokens(LENGTHS)
    layers = select_linear(model, "down_proj")
    edits = random_edits(layers)
    expected = sequence_nll(with_edits(model, edits), items)
    before = sequence_nll(model, items)
    with gradients.with_edits(layers, edits):
        found = sequence_nll(model, items)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, sequence_nll(model, items), strict=True))
