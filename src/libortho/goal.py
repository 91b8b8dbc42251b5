"""How far to forget, and what to say instead: settled before the search begins.

Forgetting more than a model that never knew would tell an attacker what was there, so the goal is
a level, not a maximum.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from libortho.data.sampling import evenly
from libortho.data.tokens import Tokens
from libortho.forgetting import (
    Target,
    sharpened,
    targets_from_earlier_model,
    targets_from_model_itself,
)
from libortho.scoring import answer_probability, context_length, sequence_nll
from libortho.training import MemoriseConfig, memorise_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TARGET_NLL = 3.0
"""Nats per token aimed at where nothing says how unfamiliar the forget set should be."""

SHOTS = 5
"""Retain examples that an earlier model is shown."""

SHOT_TOKENS = 128
"""Longest example that is shown; longer ones would leave little room for the question."""

REHEARSAL = MemoriseConfig(target=1.0, max_epochs=3)
"""How an earlier model is rehearsed: enough for the form of an answer, too little for much more."""

REHEARSED = 48
"""Retain sequences, evenly spread, that it is rehearsed on."""

SHARPENING = 0.65
"""Temperature at which an earlier model's predictions are wanted, the level being settled. A model
that knows the form only is less sure of itself than one that was fine-tuned to the end, and an edit
of few directions ends flatter still than what it is fitted to; Min-K%++ would see that. Too low a
temperature is seen, too: the model would be surer of the forget set than of unseen text."""

DRIFT = 1.25
"""Multiple of the settled level, or part of it, that the level may move to with what the base makes
of the unseen text. Text that an edit moves further is not what was compared any more."""

Earlier = Literal["rehearse", "rehearsed", "show", "trust"]
"""How a model from before the memorising is asked. "rehearse": a copy of it is fine-tuned for a
moment on some of the retain set, so that it answers in its form and lacks the forget set's content,
as a retrained model would. "show": it is shown a few retain examples instead, which takes no more
memory and guides less well. "rehearsed": as the first, done before, so that it is asked as it is.
"trust": at its word, for a model that was retrained."""


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
        level: wanted probability per token, mean over sequences, as far as it can be told before
            anything was edited.
        source: where the level comes from, for the report.
        unseen: the comparable text that the level was taken from, on which the drift is measured;
            empty where it was not taken from any.
        familiar: what the unedited model gives it, a probability per token.
    """

    targets: list[Target]
    level: float
    source: str
    unseen: Sequence[Tokens] = ()
    familiar: float = math.nan

    def level_beside(self, model: PreTrainedModel) -> float:
        """The level, from what `model` as it is now, with its edits, makes of the unseen text.

        Who looks for what was forgotten compares it with other text under the same model, and an
        edit moves that text, too: towards the form of an answer, or away from all sense.
        """
        if not self.unseen:
            return self.level
        drift = answer_probability(sequence_nll(model, self.unseen)) / max(self.familiar, 1e-12)
        return self.level * min(max(drift, 1 / DRIFT), DRIFT)


def choose_goal(
    model: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    *,
    before: PreTrainedModel | None = None,
    unseen: Sequence[Tokens] | None = None,
    target_nll: float | None = None,
    earlier: Earlier = "rehearse",
    rehearsal: MemoriseConfig = REHEARSAL,
) -> Goal:
    """Settle the goal from what the caller has; see `separate_` and `SeparationConfig`.

    Raises:
        ValueError: `target_nll` stands beside `before` or `unseen`, which say the same thing; or
            the model makes NaN of unseen text; or `before` is to be rehearsed and not whole in
            memory.
    """
    check_guides(target_nll, before, unseen)
    level = None
    if unseen is not None:
        level = answer_probability(sequence_nll(model, unseen))
        if math.isnan(level):
            raise ValueError("the unseen set's probability is NaN")
    if before is not None:
        return _from_earlier_model(before, forget, retain, unseen, level, earlier, rehearsal)
    source = "probability per token of comparable unseen text"
    if level is None:
        nll = DEFAULT_TARGET_NLL if target_nll is None else target_nll
        level, source = math.exp(-nll), f"{nll:.3g} nats per token"
    targets = targets_from_model_itself(model, forget, level)
    return Goal(targets, level, source, unseen or (), level)


def check_guides(target_nll: float | None, before: object | None, unseen: object | None) -> None:
    """Raise ValueError where two of `choose_goal`'s arguments say the same thing."""
    if target_nll is not None and (before is not None or unseen is not None):
        raise ValueError("target_nll and before/unseen both say how much to forget: give one")


def _from_earlier_model(
    before: PreTrainedModel,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    unseen: Sequence[Tokens] | None,
    level: float | None,
    earlier: Earlier,
    rehearsal: MemoriseConfig,
) -> Goal:
    source, context = "the earlier model", []
    if earlier == "rehearse":
        if any(parameter.is_meta for parameter in before.parameters()):
            raise ValueError(
                "the earlier model has weights on disk or beside its device, and a rehearsal is a "
                'fine-tune of all of them: give earlier="show", which takes no training'
            )
        before = copy.deepcopy(before)
        memorise_(before, evenly(retain, REHEARSED), rehearsal)
        source += f", rehearsed on {min(REHEARSED, len(retain))} retain sequences"
    elif earlier == "show":
        # Only questions with answers have a form to be shown; plain text is taken as it comes.
        asked = any(item.prompt > 1 for item in forget)
        shots = [i for i in retain if asked and i.prompt > 1 and len(i.ids) <= SHOT_TOKENS]
        asking = max(len(item.ids) for item in (*forget, *(unseen or ())))
        context = _fitting(evenly(shots, SHOTS), context_length(before) - asking)
        source += f", shown {len(context)} retain examples"
    targets, expected = _said(before, forget, context)
    if earlier != "trust":
        targets = [sharpened(target, SHARPENING) for target in targets]
    source = f"{source} ({expected:.3f})"
    if unseen is None or level is None or earlier == "trust":
        return Goal(targets, expected, source)
    _, stranger = _said(before, unseen, context)
    source += f" beside {stranger:.3f} on unseen text, which the model gives {level:.3f}"
    return Goal(targets, carried_over(level, expected, stranger), source, unseen, level)


def _fitting(shots: list[Tokens], room: int) -> list[Tokens]:
    """As many of the shots, from the first on, as have room before any question."""
    used = list(accumulate(len(shot.ids) for shot in shots))
    return shots[: bisect_right(used, room)]


def carried_over(unseen: float, earlier: float, earlier_unseen: float) -> float:
    """What a model that never saw the forget set should give it, a probability per token.

    What the model gives unseen text, times how much more likely the earlier model, which knows
    neither, finds the forget set (docs/method.md has the errors). Never above both of its parts: in
    doubt, more is forgotten.

    Args:
        unseen: the model's probability of unseen text.
        earlier: the earlier model's, of the forget set.
        earlier_unseen: the earlier model's, of the unseen text.
    """
    return min(unseen * earlier / max(earlier_unseen, 1e-12), max(unseen, earlier))


def _said(
    before: PreTrainedModel, items: Sequence[Tokens], context: Sequence[Tokens]
) -> tuple[list[Target], float]:
    """The earlier model's predictions of the items, and its probability per token of them."""
    targets = targets_from_earlier_model(before, items, context)
    return targets, sum(t.answer_probability for t in targets) / len(targets)
