"""How far to forget, and what to say instead: settled before the search begins.

Forgetting more than a model that never knew would tell an attacker what was there, so the goal is
a level, not a maximum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from libortho.data.tokens import Tokens, evenly
from libortho.forgetting import (
    Target,
    targets_from_earlier_model,
    targets_from_model_itself,
)
from libortho.scoring import answer_probability, sequence_nll
from libortho.training import MemoriseConfig, memorise_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TARGET_NLL = 3.0
"""Nats per token aimed at where nothing says how unfamiliar the forget set should be."""

SHOTS = 5
"""Retain examples that an earlier model is shown, where it is not rehearsed."""

SHOT_TOKENS = 128
"""Longest example that is shown; longer ones would leave little room for the question."""

REHEARSAL_EPOCHS = 3
"""Passes over the rehearsed examples: enough for the form of an answer, too few for much more."""


@runtime_checkable
class Aiming(Protocol):
    """The config of a method that searches for a goal: how far to forget, how near is enough."""

    @property
    def target_nll(self) -> float | None: ...

    @property
    def tolerance(self) -> float: ...


@dataclass(frozen=True)
class Goal:
    """What the forget set should look like at alpha = 0.

    Attributes:
        targets: wanted distributions, one per forget sequence.
        level: wanted probability per token, mean over sequences.
        source: where the level comes from, for the report.
    """

    targets: list[Target]
    level: float
    source: str


def choose_goal(
    model: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    *,
    before: PreTrainedModel | None = None,
    unseen: Sequence[Tokens] | None = None,
    target_nll: float | None = None,
    rehearsal: int = 0,
) -> Goal:
    """Settle the goal from what the caller has; see `separate_` for the arguments.

    Args:
        rehearsal: retain sequences that a copy of `before` is fine-tuned on, briefly, so that it
            answers in the form of the retain set while it lacks the forget set's content: a small
            stand-in for a retrained model. 0 shows it `SHOTS` examples instead.

    Raises:
        ValueError: `target_nll` stands beside `before` or `unseen`, which say the same thing.
    """
    if target_nll is not None and (before is not None or unseen is not None):
        raise ValueError("target_nll and before/unseen both say how much to forget: give one")
    level = None
    if unseen is not None:
        level = answer_probability(sequence_nll(model, unseen))
    if before is not None and rehearsal:
        return _from_rehearsed_model(before, forget, retain, level, rehearsal)
    if before is not None:
        return _from_earlier_model(before, forget, retain, level)
    source = "probability per token of comparable unseen text"
    if level is None:
        nll = DEFAULT_TARGET_NLL if target_nll is None else target_nll
        level, source = math.exp(-nll), f"{nll:.3g} nats per token"
    return Goal(targets_from_model_itself(model, forget, level), level, source)


def _from_earlier_model(
    before: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    level: float | None,
) -> Goal:
    # Only questions with answers have a form to be shown; plain text is taken as it comes.
    asked = any(item.prompt > 1 for item in forget)
    shots = [i for i in retain if asked and i.prompt > 1 and len(i.ids) <= SHOT_TOKENS]
    context = shots[:: max(1, len(shots) // SHOTS)][:SHOTS]
    targets = targets_from_earlier_model(before, forget, context)
    return _settled(targets, "what the model said before it memorised", level)


def _from_rehearsed_model(
    before: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    level: float | None,
    count: int,
) -> Goal:
    """The goal by a copy of `before` that is briefly fine-tuned on some of the retain set."""
    rehearsed = copy.deepcopy(before)
    memorise_(
        rehearsed,
        evenly(retain, count),
        MemoriseConfig(target=1.0, max_epochs=REHEARSAL_EPOCHS),
    )
    targets = targets_from_earlier_model(rehearsed, forget)
    source = f"an earlier model rehearsed on {min(count, len(retain))} retain examples"
    return _settled(targets, source, level)


def _settled(targets: list[Target], source: str, level: float | None) -> Goal:
    """The goal, its level being that of the targets or, with unseen text, between the two.

    Two estimates of the same level, off for different reasons: one model does not know the content,
    one content is not known to the model. Their geometric mean is closer to a retrained model than
    either (docs/method.md has the numbers).
    """
    expected = sum(t.answer_probability for t in targets) / len(targets)
    source = f"{source} ({expected:.3f})"
    if level is None:
        return Goal(targets, expected, source)
    return Goal(targets, math.sqrt(level * expected), f"{source}, and unseen text ({level:.3f})")
