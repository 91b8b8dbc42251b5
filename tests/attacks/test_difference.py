"""Differences: planted directions are read, and what an ortho file alone gives away."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from libortho.attacks import Subject
from libortho.attacks import difference as module
from libortho.attacks.difference import (
    AUC,
    DifferenceConfig,
    Directions,
    by_lens,
    by_response,
    difference,
    two_sided,
)
from libortho.data.tokens import Tokens

LAYER = "model.layers.1.mlp.down_proj"


def test_directions_are_the_largest_ones() -> None:
    matrix = torch.randn(9, 3) @ torch.randn(3, 13)
    whole = Directions.of(matrix, 8)
    assert whole is not None
    assert whole.sizes.shape == (3,)
    torch.testing.assert_close(whole.left @ whole.sizes.diag() @ whole.right, matrix)
    part = Directions.of(matrix, 2)
    assert part is not None
    torch.testing.assert_close(part.sizes, torch.linalg.svdvals(matrix)[:2])
    assert Directions.of(torch.zeros(4, 5), 2) is None


def test_the_lens_reads_a_word_that_is_written(data) -> None:
    weight = data.pretrained.get_output_embeddings().weight.float()
    red = data.tokenizer.convert_tokens_to_ids("red")
    written = (weight[red] - weight.mean(dim=0))[:, None]
    found = Directions.of(written @ torch.randn(1, 64), 4)
    words = ["house", "red", "garden", "she", "house red"]
    rated = by_lens({LAYER: found}, words, data)
    assert max(words, key=lambda w: rated[words.index(w)]) == "red"
    assert rated[words.index("house")] < rated[words.index("house red")] < rated[1]
    assert rated[1] == pytest.approx(float(found.sizes.square().sum()), rel=1e-3)
    elsewhere = Directions.of(torch.randn(7, 64), 4)  # writes into another space
    assert by_lens({LAYER: elsewhere}, words, data) is None


def test_the_response_is_that_of_the_matrix(data) -> None:
    """Against each text run alone, with the difference as one matrix."""
    texts = ["who is she ?", "red", "the house in the garden is red ."]
    items = module._plain(texts, data)
    matrices = {f"model.layers.{i}.mlp.down_proj": torch.randn(32, 64) for i in (0, 1)}
    layers = {name: Directions.of(m, 64) for name, m in matrices.items()}
    expected = []
    for item in items:
        seen = {}
        handles = [
            data.pretrained.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.update({name: args[0][0, 1:].float()})
            )
            for name in matrices
        ]
        data.pretrained(input_ids=torch.tensor([item.ids]))
        for handle in handles:
            handle.remove()
        shares = [
            float(((x @ matrices[n].T).norm(dim=1) / x.norm(dim=1)).square().mean())
            / float(matrices[n].square().sum())
            for n, x in seen.items()
        ]
        expected.append(sum(shares) / len(shares))
    assert by_response(layers, items, data) == pytest.approx(expected, rel=0.02)
    assert not any(m._forward_pre_hooks for m in data.pretrained.modules())


def test_two_sided() -> None:
    assert two_sided([3.0, 4.0], [1.0, 2.0])[0] == 1.0
    assert two_sided([3.0, 4.0], [1.0, 2.0])[1]["auc"] == 1.0
    value, details = two_sided([0.0], [1.0, 2.0, -1.0])
    assert (value, details["auc"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert details["null_sd"] == pytest.approx((5 / 36) ** 0.5)


def test_an_edit_for_some_questions_is_told(data, quiet, monkeypatch) -> None:
    """A layer that answers to what it read of the forgotten questions, and to nothing else."""
    import copy

    model = copy.deepcopy(data.pretrained)
    layer = model.get_submodule(LAYER)
    seen = []
    handle = data.pretrained.get_submodule(LAYER).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0, 1:].float())
    )
    for item in module._plain([e.question for e in data.forget], data):
        data.pretrained(input_ids=torch.tensor([item.ids]))
    handle.remove()
    keys = torch.cat(seen)
    with torch.no_grad():
        layer.weight += (torch.randn(32, len(keys)) @ keys).to(layer.weight.dtype)
    subject = Subject("edited", model, [LAYER])
    found = difference(subject, data, DifferenceConfig(), quiet)
    scores = {score.name: score for score in found.scores}
    told = scores["questions by response"]
    assert told.measure == AUC
    assert told.value > 0.8
    assert told.details["auc"] > 0.8
    # These questions have no names.
    assert "no name was found" in found.missing["names by the lens"]


def test_names_are_ranked(data, quiet, monkeypatch) -> None:
    """Names are whatever `names_in` finds; here, words that the tokenizer has."""
    told = {data.forget: ["red house"], data.retain: ["she", "he"], data.holdout: ["garden"]}
    monkeypatch.setattr(module, "names_in", lambda examples: told[examples])
    weight = data.pretrained.get_output_embeddings().weight.float()
    ids = data.tokenizer(" red house", add_special_tokens=False).input_ids
    written = (weight[ids] - weight.mean(dim=0)).sum(dim=0)
    import copy

    model = copy.deepcopy(data.pretrained)
    with torch.no_grad():
        weight = model.get_submodule(LAYER).weight
        weight += torch.outer(written, torch.randn(64)).to(weight.dtype)
    found = difference(Subject("edited", model, [LAYER]), data, DifferenceConfig(), quiet)
    scores = {score.name: score for score in found.scores}
    assert scores["names by the lens"].value == 1.0
    assert scores["names by the lens"].details["ranks"] == {"red house": 1}
    assert scores["names by the lens"].details["names"] == 4
    assert "names by response" in scores


def test_the_ortho_file_is_read_without_its_base(subjects, data, quiet, unharmed) -> None:
    check = unharmed(subjects["alpha 0"])
    base = difference(subjects["alpha 0"], data, DifferenceConfig(), quiet)
    check()
    names = [score.name for score in base.scores]
    assert names == ["questions by response", "ortho file: questions by response"]
    reference = difference(subjects["reference"], data, DifferenceConfig(), quiet)
    assert [score.name for score in reference.scores] == names[:1]
    # The ortho file is the same whatever the base runs at.
    whole = difference(subjects["alpha 1"], data, DifferenceConfig(), quiet)
    assert whole.scores[1] == base.scores[1]
    assert whole.scores[0] != base.scores[0]


def test_what_is_lacking_is_said(data, quiet) -> None:
    itself = Subject("pretrained", data.pretrained, [LAYER])
    found = difference(itself, data, DifferenceConfig(), quiet)
    assert found.missing == {"difference": "the targeted layers are the public model's own"}
    private = dataclasses.replace(data, pretrained=None)
    found = difference(itself, private, DifferenceConfig(), quiet)
    assert "--pretrained" in found.missing["difference"]
    with pytest.raises(ValueError, match="directions=0"):
        DifferenceConfig(directions=0)


def test_a_text_of_one_word_has_a_place_to_be_read(data) -> None:
    for item in module._plain(["red", "who is she ?"], data):
        assert isinstance(item, Tokens)
        assert len(item.ids) >= 2
