"""Membership inference: does the model give away that it was trained on the forget set?

Members are the forget questions, non-members held-out ones about authors that no model has seen.
The two also differ by chance, as any two sets of authors do: the reference, which saw neither,
shows how much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from libortho.attacks.common import AttackData, Findings, Progress, Score, Subject
from libortho.config import check_fraction
from libortho.data.tokens import Tokens
from libortho.evaluation.entries import ATTACKS
from libortho.evaluation.metrics import loss_score, membership_auc, roc_curve, tpr_at_fpr
from libortho.scoring import token_statistics

CALIBRATED = "calibrated by the pretrained model"


@dataclass(frozen=True)
class MembershipConfig:
    """What is measured.

    Attributes:
        fpr: rate of non-members that may be taken for members, a fraction.
    """

    fpr: float = 0.01

    def __post_init__(self) -> None:
        check_fraction("fpr", self.fpr, zero=True)

    @classmethod
    def small(cls, seed: int) -> MembershipConfig:
        """The same: it is one forward pass."""
        return cls()


def membership(
    subject: Subject, data: AttackData, config: MembershipConfig, progress: Progress
) -> Findings:
    """The true positive rate at a low false positive rate, for each score and for its opposite.

    The opposite (", reversed") calls those members that are conspicuously *unlikely*: forgetting
    more than a model does that never saw them gives them away, too. Scores are those of
    `libortho.evaluation.metrics.membership`, and the loss less the pretrained model's (Watson et
    al. 2021, arXiv 2111.08440).
    """
    if not data.holdout:
        return Findings((), {"membership": "no held-out questions were given (--holdout)"})
    sides = {"forget": data.encode(data.forget), "holdout": data.encode(data.holdout)}
    items = [item for side in sides.values() for item in side]
    statistics = token_statistics(
        subject.model, items, progress=lambda done, total: progress("score", done, total)
    )
    texts = [
        str(data.tokenizer.decode(list(item.ids[item.prompt :]), skip_special_tokens=True))
        for item in items
    ]
    values = {
        name.removeprefix("mia_").replace("_", " "): [
            attack(s, text) for s, text in zip(statistics, texts, strict=True)
        ]
        for name, attack in ATTACKS.items()
    }
    missing = {}
    if data.pretrained is None:
        missing[CALIBRATED] = "no pretrained model was given (--pretrained)"
    else:
        own = [loss_score(s.nll.tolist()) for s in statistics]
        values[CALIBRATED] = _less_pretrained(own, items, data)
    members = len(sides["forget"])
    scores = []
    for name, scored in values.items():
        for suffix, sign in (("", 1.0), (", reversed", -1.0)):
            signed = [sign * value for value in scored]
            scores.append(
                membership_score(name + suffix, signed[:members], signed[members:], config.fpr)
            )
    return Findings(tuple(scores), missing)


def _less_pretrained(own: list[float], items: list[Tokens], data: AttackData) -> list[float]:
    assert data.pretrained is not None
    public = token_statistics(data.pretrained, items)
    return [a - loss_score(s.nll.tolist()) for a, s in zip(own, public, strict=True)]


def membership_score(
    name: str, members: Sequence[float], others: Sequence[float], fpr: float
) -> Score:
    """TPR at `fpr`, and the whole ROC curve beside it.

    `details["coarseness"]` is how much one member more or less changes the rate; "null_sd" the
    standard deviation of the AUC of a score that knows nothing (Mann and Whitney 1947).
    """
    m, n = len(members), len(others)
    return Score(
        name,
        f"TPR at {fpr:.0%} FPR",
        tpr_at_fpr(members, others, fpr),
        fpr,
        details={
            "auc": membership_auc(members, others),
            "null_sd": math.sqrt((m + n + 1) / (12 * m * n)),
            "members": m,
            "others": n,
            "coarseness": 1 / m,
            "others_mistaken_at_most": math.floor(fpr * n),
            "roc": roc_curve(members, others),
        },
    )
