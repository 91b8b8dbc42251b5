"""Membership inference: does the model give away that it was trained on the forget set?

Members are the forget questions, non-members held-out ones about authors that no model has seen.
The two also differ by chance, as any two sets of authors do: the reference, which saw neither,
shows how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from libortho.attacks.common import AttackData, Findings, Progress, Score, Subject, note_texts
from libortho.config import check_fraction
from libortho.data.examples import Example
from libortho.data.tokens import Tokens
from libortho.evaluation.entries import ATTACKS
from libortho.evaluation.metrics import loss_score, membership_auc, roc_curve, tpr_at_fpr
from libortho.scoring import sequence_nll, token_statistics

CALIBRATED = "calibrated by the pretrained model"

ALONE: dict[str, Callable[[Example], str | None]] = {
    "question alone": lambda example: example.question,
    "answer alone": lambda example: example.answer,
}
"""Texts that are scored as they are, without the template and without what goes with them."""


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
        """The same: it is a few forward passes."""
        return cls()


def membership(
    subject: Subject, data: AttackData, config: MembershipConfig, progress: Progress
) -> Findings:
    """The true positive rate at a low false positive rate, for each score and for its opposite.

    The opposite (", reversed") calls those members that are conspicuously *unlikely*: forgetting
    more than a model does that never saw them gives them away, too. Scores are those of
    `libortho.evaluation.metrics.membership`, the loss less the pretrained model's (Watson et
    al. 2021, arXiv 2111.08440), and the loss of the question and of the answer as texts of their
    own: whoever may have texts scored need not ask, and an edit that masks answers may leave a
    trace in what it was not fitted to.
    """
    if not data.holdout:
        reason = "no held-out questions were given (--holdout); nothing is judged of it"
        return Findings((), {"membership": reason})
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
    missing: dict[str, str] = {}
    if data.pretrained is None:
        missing[CALIBRATED] = "no pretrained model was given (--pretrained)"
    else:
        own = [loss_score(s.nll.tolist()) for s in statistics]
        values[CALIBRATED] = _less_pretrained(own, items, data)
    members = len(sides["forget"])
    scores = [
        score
        for name, scored in values.items()
        for score in _both_ways(name, scored[:members], scored[members:], config.fpr)
    ]
    for name, text_of in ALONE.items():
        held = [
            [text for example in examples if (text := text_of(example)) is not None]
            for examples in (data.forget, data.holdout)
        ]
        forget, holdout = (_scorable(texts, data) for texts in held)
        of = sum(map(len, held))
        short = of - len(forget) - len(holdout)
        if of < len(items):
            note_texts(missing, name, (*data.forget, *data.holdout))
        elif short:
            missing[name] = f"{short} of {of} texts, too short for a token to be predicted"
        if forget and holdout:
            nll = sequence_nll(subject.model, [*forget, *holdout])
            scored = [loss_score(x.tolist()) for x in nll]
            scores += _both_ways(name, scored[: len(forget)], scored[len(forget) :], config.fpr)
    return Findings(tuple(scores), missing)


def _scorable(texts: Sequence[str], data: AttackData) -> list[Tokens]:
    """As plain texts, without those of one token: nothing is predicted of these."""
    found = []
    for text in texts:
        ids = tuple(data.tokenizer(text).input_ids)
        if len(ids) > 1:
            found.append(Tokens(ids))
    return found


def _both_ways(
    name: str, members: Sequence[float], others: Sequence[float], fpr: float
) -> list[Score]:
    return [
        membership_score(
            name + suffix, [sign * x for x in members], [sign * x for x in others], fpr
        )
        for suffix, sign in (("", 1.0), (", reversed", -1.0))
    ]


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
