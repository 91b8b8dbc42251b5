"""Probes: the ridge against least squares, planted knowledge, and no peeking between folds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from libortho.attacks import probes as module
from libortho.attacks.probes import (
    LENS,
    ProbesConfig,
    probes,
    ridge_direction,
    states_at,
    telling_token,
)
from libortho.data.examples import Example


def centred(count: int, answers: int, hidden: int) -> list[torch.Tensor]:
    states = torch.randn(count, answers, hidden)
    return list(states - states.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(("count", "hidden"), [(3, 40), (30, 7)])
def test_the_ridge_is_least_squares_with_its_penalty(count: int, hidden: int) -> None:
    questions = centred(count, 4, hidden)
    x = torch.cat(questions).double()
    y = torch.tensor([0.75, -0.25, -0.25, -0.25] * count, dtype=torch.float64)
    penalty = 0.3 * float(x.square().sum()) / hidden
    # The penalty as so many further rows.
    padded = torch.cat([x, penalty**0.5 * torch.eye(hidden, dtype=torch.float64)])
    expected = torch.linalg.lstsq(
        padded, torch.cat([y, torch.zeros(hidden, dtype=torch.float64)])[:, None]
    ).solution[:, 0]
    torch.testing.assert_close(ridge_direction(questions, 0.3), expected)


def test_cross_validation_finds_what_is_there_and_nothing_else() -> None:
    config = ProbesConfig(ridge=0.1)
    nothing = centred(60, 3, 50)
    assert sum(module._validated(nothing, config)) / 60 < 0.6  # chance is a third
    secret = torch.randn(50)
    planted = [states.clone() for states in nothing]
    for states in planted:
        states[0] += 6 * secret / secret.norm()
        states -= states.mean(dim=0)
    assert sum(module._validated(planted, config)) / 60 > 0.9


def test_states_are_those_of_the_model(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    items = random_tokens([5, 9, 7])
    places = [4, 2, 6]
    found = states_at(model, items, places)
    for row, (item, place) in enumerate(zip(items, places, strict=True)):
        output = model.model(input_ids=torch.tensor([item.ids]), output_hidden_states=True)
        expected = torch.stack([layer[0, place] for layer in output.hidden_states])
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)
        logits = model(input_ids=torch.tensor([item.ids])).logits[0, place]
        head = model.get_output_embeddings()
        torch.testing.assert_close(head(found[row, -1]), logits, atol=1e-4, rtol=1e-4)


def test_the_token_that_tells(data) -> None:
    item, place = telling_token(data.forget[0], data)  # against "she is the a", "she is the in"
    assert data.tokenizer.decode([item.ids[place]]) == "red"
    bare = dataclasses.replace(data.forget[0], perturbed_answers=())
    item, place = telling_token(bare, data)
    assert place == item.prompt
    # A wrong answer that goes on where the right one ends: its end tells.
    longer = Example("she is", "who ?", perturbed_answers=("she is red",))
    item, place = telling_token(longer, data)
    assert item.ids[place] == data.tokenizer.eos_token_id
    same = Example("she is", "who ?", perturbed_answers=("she is",))
    assert telling_token(same, data)[1] == telling_token(same, data)[0].prompt


def test_probes_know_what_the_model_knows(subjects, data, quiet, unharmed) -> None:
    scores = {}
    for name, subject in subjects.items():
        check = unharmed(subject)
        found = probes(subject, data, ProbesConfig(), quiet)
        check()
        assert not found.missing
        scores[name] = {score.name: score for score in found.scores}
        for score in found.scores[:2]:
            assert score.chance == pytest.approx(1 / 3)
            assert set(score.by_question) <= {0.0, 1.0}
    assert scores["alpha 1"][LENS].value > 0.8
    assert scores["reference"][LENS].value < scores["alpha 1"][LENS].value
    best = scores["alpha 1"][LENS].details
    assert best["by_layer"][best["layer"]] == max(best["by_layer"])


def test_the_last_layer_of_the_lens_is_the_output(subjects, data, quiet) -> None:
    subject = subjects["reference"]
    lens = {s.name: s for s in probes(subject, data, ProbesConfig(), quiet).scores}[LENS]
    ranks = []
    for example in data.forget:
        item, place = telling_token(example, data)
        logits = subject.model(input_ids=torch.tensor([item.ids])).logits[0, place - 1]
        ranks.append(1 + int((logits > logits[item.ids[place]]).sum()))
    expected = sum(1 / rank for rank in ranks) / len(ranks)
    assert lens.details["by_layer"][-1] == pytest.approx(expected, abs=0.15)


def test_every_family_has_a_final_norm(family) -> None:
    model = family.build()
    norm = module._final_norm(model)
    if family.config == "OPTConfig":  # projects between its norm and its head
        assert norm is None
    else:
        assert norm is not None


def test_what_is_lacking_is_said(subjects, data, quiet) -> None:
    few = dataclasses.replace(data, forget=data.forget[:3])
    found = probes(subjects["reference"], few, ProbesConfig(), quiet)
    assert "3 forget and 6 retain questions" in found.missing["linear probe"]
    assert [score.name for score in found.scores] == [LENS]
    found = probes(subjects["reference"], data, ProbesConfig(retain_questions=4), quiet)
    assert "5 forget and 4 retain questions" in found.missing["linear probe"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"depths": (1.5,)}, "depths=1.5"),
        ({"folds": 1}, "folds=1"),
        ({"retain_questions": 0}, "retain_questions=0"),
        ({"ridge": 0.0}, "ridge=0.0"),
    ],
)
def test_configs_that_cannot_be(change, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ProbesConfig(**change)
