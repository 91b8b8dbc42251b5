"""Membership inference on a model that knows and on one that does not."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from tokenizers import processors

from libortho.attacks.membership import (
    ALONE,
    CALIBRATED,
    MembershipConfig,
    membership,
    membership_score,
)
from libortho.data.examples import Example
from libortho.data.tokens import encode
from libortho.evaluation.metrics import loss_score, tpr_at_fpr
from libortho.scoring import sequence_nll


def test_members_are_told_where_they_are_known(subjects, data, quiet, unharmed) -> None:
    check = unharmed(subjects["alpha 1"])
    found = membership(subjects["alpha 1"], data, MembershipConfig(), quiet)
    check()
    assert not found.missing
    scores = {score.name: score for score in found.scores}
    plain = ["loss", "zlib", "min k", "min k plus plus", CALIBRATED, *ALONE]
    assert list(scores) == [name + end for name in plain for end in ("", ", reversed")]
    assert scores["loss"].value == 1.0
    assert scores["loss, reversed"].value == 0.0
    assert scores["loss"].details["auc"] + scores["loss, reversed"].details["auc"] == 1.0
    assert scores[CALIBRATED].value == 1.0
    assert scores["loss"].chance == 0.01
    unknown = membership(subjects["reference"], data, MembershipConfig(), quiet)
    assert {s.name: s for s in unknown.scores}["loss"].value < 1.0


def test_calibration_takes_the_public_loss_off(subjects, data, quiet) -> None:
    """A model against itself knows nothing: every score is 0, and a tie mistakes all others."""
    itself = dataclasses.replace(data, pretrained=subjects["reference"].model)
    found = membership(subjects["reference"], itself, MembershipConfig(), quiet)
    score = {s.name: s for s in found.scores}[CALIBRATED]
    assert score.value == 0.0
    assert score.details["auc"] == pytest.approx(0.5, abs=0.2)
    items = data.encode([*data.forget, *data.holdout])
    own, public = (
        [loss_score(x.tolist()) for x in sequence_nll(model, items)]
        for model in (subjects["reference"].model, data.pretrained)
    )
    gaps = [a - b for a, b in zip(own, public, strict=True)]
    expected = membership_score("x", gaps[: len(data.forget)], gaps[len(data.forget) :], 0.01)
    honest = membership(subjects["reference"], data, MembershipConfig(), quiet)
    score = {s.name: s for s in honest.scores}[CALIBRATED]
    assert score.value == expected.value
    assert score.details["auc"] == expected.details["auc"]


def test_what_is_lacking_is_said(subjects, data, quiet) -> None:
    alone = dataclasses.replace(data, holdout=())
    found = membership(subjects["reference"], alone, MembershipConfig(), quiet)
    assert found.scores == ()
    assert "--holdout" in found.missing["membership"]
    private = dataclasses.replace(data, pretrained=None)
    found = membership(subjects["reference"], private, MembershipConfig(), quiet)
    assert "--pretrained" in found.missing[CALIBRATED]
    assert len(found.scores) == 12


def test_texts_are_scored_as_they_are(subjects, data, quiet) -> None:
    """The question without what is asked around it, the answer without the question."""
    chat = dataclasses.replace(data, template="chat")
    found = membership(subjects["reference"], chat, MembershipConfig(fpr=0.25), quiet)
    assert not found.missing
    scores = {score.name: score for score in found.scores}
    for name, texts in (
        ("question alone", [e.question for e in (*data.forget, *data.holdout)]),
        ("answer alone", [e.answer for e in (*data.forget, *data.holdout)]),
    ):
        items = [encode(text, data.tokenizer) for text in texts]
        assert [item.prompt for item in items] == [1] * len(items)
        losses = [loss_score(x.tolist()) for x in sequence_nll(subjects["reference"].model, items)]
        members, others = losses[: len(data.forget)], losses[len(data.forget) :]
        assert scores[name] == membership_score(name, members, others, 0.25)
        turned = scores[f"{name}, reversed"]
        assert turned.details["auc"] == pytest.approx(1 - scores[name].details["auc"])
        assert turned.value == tpr_at_fpr([-x for x in members], [-x for x in others], 0.25)
        assert (turned.details["members"], turned.details["others"]) == (5, 4)


def test_texts_of_one_token_are_left_out_and_counted(subjects, data, quiet) -> None:
    bare = copy.deepcopy(data.tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")  # no BOS
    short = Example("red", "who is she ?")
    some = dataclasses.replace(data, tokenizer=bare, forget=(*data.forget, short))
    found = membership(subjects["reference"], some, MembershipConfig(), quiet)
    told = "1 of 10 texts, too short for a token to be predicted"
    assert found.missing == {"answer alone": told}
    scores = {score.name: score for score in found.scores}
    assert scores["answer alone"].details["members"] == 5
    assert scores["question alone"].details["members"] == 6
    none = dataclasses.replace(some, forget=(short,))
    found = membership(subjects["reference"], none, MembershipConfig(), quiet)
    assert "1 of 5" in found.missing["answer alone"]
    assert not [score for score in found.scores if score.name.startswith("answer alone")]


def test_how_coarse_a_rate_is_is_said() -> None:
    score = membership_score("x", [0.1, 0.2, 0.9, 0.3], [0.5] * 250, 0.01)
    assert score.value == 0.75
    assert score.details["coarseness"] == 0.25
    assert score.details["others_mistaken_at_most"] == 2
    assert score.details["null_sd"] == pytest.approx((255 / (12 * 4 * 250)) ** 0.5)
    with pytest.raises(ValueError, match=r"fpr=1\.5"):
        MembershipConfig(fpr=1.5)
