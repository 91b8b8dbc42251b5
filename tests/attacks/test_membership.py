"""Membership inference on a model that knows and on one that does not."""

from __future__ import annotations

import dataclasses

import pytest

from libortho.attacks.membership import (
    CALIBRATED,
    MembershipConfig,
    membership,
    membership_score,
)
from libortho.evaluation.metrics import loss_score
from libortho.scoring import sequence_nll


def test_members_are_told_where_they_are_known(subjects, data, quiet, unharmed) -> None:
    check = unharmed(subjects["alpha 1"])
    found = membership(subjects["alpha 1"], data, MembershipConfig(), quiet)
    check()
    assert not found.missing
    scores = {score.name: score for score in found.scores}
    plain = ["loss", "zlib", "min k", "min k plus plus", CALIBRATED]
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
    assert len(found.scores) == 8


def test_how_coarse_a_rate_is_is_said() -> None:
    score = membership_score("x", [0.1, 0.2, 0.9, 0.3], [0.5] * 250, 0.01)
    assert score.value == 0.75
    assert score.details["coarseness"] == 0.25
    assert score.details["others_mistaken_at_most"] == 2
    assert score.details["null_sd"] == pytest.approx((255 / (12 * 4 * 250)) ** 0.5)
    with pytest.raises(ValueError, match=r"fpr=1\.5"):
        MembershipConfig(fpr=1.5)
