"""Each loss against its formula, written out in float64 on the model's whole logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from libortho.baselines.losses import (
    NPO,
    RMU,
    GradDiff,
    Objective,
    SimNPO,
    activation_term,
    block_outputs,
    decoder_blocks,
    npo_term,
    simnpo_term,
)
from libortho.data.tokens import Tokens, collate

FORGET_ROWS, RETAIN_ROWS = [2, 0], [1, 3]


@pytest.fixture
def sets(random_tokens) -> tuple[list[Tokens], list[Tokens]]:
    return random_tokens((5, 9, 7), prompt=3, seed=1), random_tokens((6, 4, 8, 10), seed=2)


@pytest.fixture
def model(tiny_llama) -> nn.Module:
    return tiny_llama()


def answer_nll(model: nn.Module, items: Sequence[Tokens]) -> list[Tensor]:
    """NLL of each predicted token, one sequence at a time, in float64."""
    double = copy.deepcopy(model).double()
    result = []
    for item in items:
        log_p = double(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(dim=-1)
        picked = [-log_p[i - 1, item.ids[i]] for i in range(item.prompt, len(item.ids))]
        result.append(torch.stack(picked))
    return result


def moved(model: nn.Module, size: float = 0.02) -> None:
    """A model some steps later: its losses differ from those of the model before."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def expected(
    objective: Objective, before: nn.Module, now: nn.Module, forget: list[Tokens]
) -> float:
    """The forget term by hand."""
    nll = answer_nll(now, forget)
    if isinstance(objective, GradDiff):
        return -float(torch.cat(nll).mean())
    if isinstance(objective, NPO):
        reference = answer_nll(before, forget)
        gaps = [float(a.sum() - b.sum()) for a, b in zip(nll, reference, strict=True)]
        beta = objective.beta
        return sum(2 / beta * softplus(-beta * gap) for gap in gaps) / len(gaps)
    assert isinstance(objective, SimNPO)
    beta, delta = objective.beta, objective.delta
    return sum(2 / beta * softplus(-beta * (float(x.mean()) - delta)) for x in nll) / len(nll)


@pytest.mark.parametrize(
    "objective",
    [
        GradDiff(),
        GradDiff(forget_weight=0.3, retain_weight=2.0),
        NPO(),
        NPO(forget_weight=0.7, retain_weight=0.5, beta=0.8),
        SimNPO(),
        SimNPO(retain_weight=3.0, beta=2.0, delta=1.5),
    ],
    ids=repr,
)
def test_likelihood_losses(objective: Objective, model, sets) -> None:
    forget, retain = sets
    before = copy.deepcopy(model)
    loss = objective.begin(model, forget)
    moved(model)
    value = loss(collate(forget, FORGET_ROWS), collate(retain, RETAIN_ROWS))
    forgetting = expected(objective, before, model, [forget[i] for i in FORGET_ROWS])
    retaining = float(torch.cat(answer_nll(model, [retain[i] for i in RETAIN_ROWS])).mean())
    wanted = objective.forget_weight * forgetting + objective.retain_weight * retaining
    assert float(value) == pytest.approx(wanted, rel=1e-5)


def test_defaults_are_open_unlearnings() -> None:
    assert (GradDiff().forget_weight, GradDiff().retain_weight) == (1.0, 1.0)
    assert (NPO().forget_weight, NPO().retain_weight, NPO().beta) == (1.0, 1.0, 0.1)
    sim = SimNPO()
    assert (sim.forget_weight, sim.retain_weight, sim.beta, sim.delta) == (0.125, 1.0, 4.5, 0.0)
    assert (RMU().forget_weight, RMU().retain_weight, RMU().steering) == (1.0, 1.0, 2.0)


def test_npo_gradient_is_the_papers() -> None:
    # Zhang et al., the adaptive weight: W = 2 p^beta / (p^beta + p_ref^beta), of -grad log p.
    nll = torch.tensor([1.0, 6.0, 30.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([2.0, 0.5, 0.1], dtype=torch.float64)
    npo_term(nll, reference, 0.3).backward()
    p, p_ref = (-0.3 * nll.detach()).exp(), (-0.3 * reference).exp()
    torch.testing.assert_close(nll.grad, -2 * p / (p + p_ref) / 3)


def test_npo_is_ascent_for_small_beta_and_bounded_for_any() -> None:
    nll = torch.tensor([3.0, 5.0], dtype=torch.float64)
    start = npo_term(torch.zeros_like(nll), torch.zeros_like(nll), 1e-6)
    assert float(start - npo_term(nll, torch.zeros_like(nll), 1e-6)) == pytest.approx(4.0, rel=1e-4)
    assert float(npo_term(nll + 1e6, nll, 0.1)) == 0.0
    assert float(simnpo_term(nll + 1e6, 0.1, 0.0)) == 0.0


def test_activation_term() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    by_token = [sum(float(a[i, j] - b[i, j]) ** 2 for j in range(3)) / 3 for i in range(5)]
    wanted = (sum(by_token[:2]) / 2 + sum(by_token[2:]) / 3) / 2
    assert float(activation_term(a, b, [2, 3])) == pytest.approx(wanted, rel=1e-12)


# -- RMU -------------------------------------------------------------------------------------------


def hidden(model: nn.Module, item: Tokens, layer: int) -> Tensor:
    """Block outputs at the predicted tokens of one sequence, (targets, width), float64."""
    double = copy.deepcopy(model).double()
    states = double(input_ids=torch.tensor([item.ids]), output_hidden_states=True).hidden_states
    return states[layer + 1][0, item.prompt :]


@pytest.fixture
def deep(tiny_llama) -> nn.Module:
    return tiny_llama(num_hidden_layers=5)


def test_rmu_loss(deep, sets) -> None:
    forget, retain = sets
    objective = RMU(forget_weight=0.5, retain_weight=2.0, steering=3.0, layer=2, seed=7)
    before = copy.deepcopy(deep)
    loss = objective.begin(deep, forget)
    for weight in objective.parameters(deep):
        weight.add_(0.1 * torch.randn(weight.shape))
    value = loss(collate(forget, FORGET_ROWS), collate(retain, RETAIN_ROWS))

    vector = torch.rand(32, generator=torch.Generator().manual_seed(7)).double()
    vector = 3.0 * vector / vector.norm()

    def distance(items: list[Tokens], wanted: Callable[[Tokens], Tensor]) -> float:
        each = [(hidden(deep, x, 2) - wanted(x)).square().mean() for x in items]
        return float(torch.stack(each).mean())

    forgetting = distance([forget[i] for i in FORGET_ROWS], lambda item: vector)
    retaining = distance([retain[i] for i in RETAIN_ROWS], lambda item: hidden(before, item, 2))
    assert forgetting > 0.1
    assert retaining > 1e-3
    assert float(value) == pytest.approx(0.5 * forgetting + 2.0 * retaining, rel=1e-5)


def test_rmu_starts_with_no_retain_loss_and_moves_only_its_weights(deep, sets) -> None:
    forget, retain = sets
    heavy, light = (RMU(layer=2, trained_layers=2, retain_weight=w) for w in (1e6, 0.0))
    pair = collate(forget, FORGET_ROWS), collate(retain, RETAIN_ROWS)
    assert float(heavy.begin(deep, forget)(*pair)) == float(light.begin(deep, forget)(*pair))
    trained = heavy.parameters(deep)
    deep.requires_grad_(True)
    assert [id(w) for w in trained] == [
        id(deep.model.layers[i].mlp.down_proj.weight) for i in (1, 2)
    ]
    light.begin(deep, forget)(*pair).backward()
    assert all(float(w.grad.norm()) > 0 for w in trained)
    # What stands above the steered block does not run.
    assert deep.model.layers[3].mlp.down_proj.weight.grad is None
    assert deep.lm_head.weight.grad is None


@pytest.mark.parametrize(("depth", "blocks"), [(30, [5, 6, 7]), (32, [5, 6, 7]), (2, [0])])
def test_rmu_depth(tiny_llama, depth: int, blocks: list[int]) -> None:
    model = tiny_llama(num_hidden_layers=depth)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(w)] for w in RMU().parameters(model)] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in blocks
    ]


def test_block_outputs_in_every_family(family, random_tokens) -> None:
    model = family.build()
    items = random_tokens((5, 7), prompt=3)
    found = block_outputs(model, decoder_blocks(model)[0], collate(items, [1, 0]))
    for got, item in zip(found.split([4, 2]), (items[1], items[0]), strict=True):
        torch.testing.assert_close(got.double(), hidden(model, item, 0), rtol=1e-4, atol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GradDiff(forget_weight=0.0), ValueError, "forget_weight=0.0: expected a finite"),
        (lambda: NPO(retain_weight=-1.0), ValueError, "retain_weight=-1.0"),
        (lambda: NPO(beta=0), ValueError, "beta=0: expected a finite number > 0"),
        (lambda: NPO(beta="1"), TypeError, "beta='1': expected a number"),
        (lambda: SimNPO(delta=math.nan), ValueError, "delta=nan"),
        (lambda: RMU(steering=math.inf), ValueError, "steering=inf"),
        (lambda: RMU(trained_layers=0), ValueError, "trained_layers=0: expected an integer >= 1"),
        (lambda: RMU(layer=-1), ValueError, "layer=-1: expected an integer >= 0"),
    ],
)
def test_bad_settings(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_rmu_names_what_the_model_lacks(model) -> None:
    with pytest.raises(ValueError, match="layer=2: the model's blocks are 0 to 1"):
        RMU(layer=2).parameters(model)
    with pytest.raises(ValueError, match="target 'fc9' matches no module"):
        RMU(modules=("fc9",)).parameters(model)
    with pytest.raises(TypeError, match="linear layer"):
        RMU(modules=("input_layernorm",)).parameters(model)
    model.config.num_hidden_layers = 9
    with pytest.raises(ValueError, match="no list of 9 blocks"):
        RMU().parameters(model)
