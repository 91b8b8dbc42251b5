"""What a split is given, checked against the models before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from libortho.data.examples import Example
from libortho.data.general import general_questions, general_text
from libortho.data.sampling import spread
from libortho.data.tokens import Template, Tokens, as_tokens, collate
from libortho.scoring import check_vocabulary, context_length

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERAL_TOKENS = 6_000
"""Tokens of general prose that are protected: several times a small model's layer width."""


def check_merged(model: nn.Module, label: str) -> None:
    """Raise ValueError where PEFT has put adapters on layers, which a saved split would lack."""
    for name, module in model.named_modules():
        # Told by its module, so that nothing here imports PEFT.
        if type(module).__module__.partition(".")[0] == "peft":
            place = f" at {name}" if name else ""
            raise ValueError(
                f"{label} has a PEFT adapter{place}, which would be lost: merge it first, by "
                "merge_and_unload(), and split the model that this returns"
            )


def check_outputs(model: PreTrainedModel, before: PreTrainedModel) -> None:
    """Raise ValueError unless the earlier model predicts the same tokens."""
    sizes = []
    for one in (model, before):
        head = one.get_output_embeddings()
        sizes.append(int(getattr(head, "out_features", 0) or head.weight.shape[0]))
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the earlier model predicts {sizes[1]} tokens and the model {sizes[0]}: expected the "
            "same vocabulary (resize_token_embeddings makes it so, where one is padded)"
        )


def general_tokens(
    model: PreTrainedModel,
    before: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
) -> list[Tokens]:
    """The embedded general text, each piece as far as the models' context goes.

    Args:
        model, before: as of `checked_tokens`.
        tokenizer: the model's.
        template: how questions become prompts; None for prose alone, where nothing is asked.
    """
    longest = context_length(model, before)
    items = spread([as_tokens(general_text(), "general text", tokenizer)], GENERAL_TOKENS)
    if template is not None:
        items += as_tokens(general_questions(), "general questions", tokenizer, template)
    return [Tokens(item.ids[:longest], item.prompt) for item in items if item.prompt < longest]


def checked_tokens(
    model: PreTrainedModel,
    before: PreTrainedModel | None,
    items: Sequence[Any],
    label: str,
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
) -> list[Tokens]:
    """What a caller gave as a set, in tokens that the models take.

    Args:
        model: the one to be split.
        before: the earlier one, or None.
        items, label, tokenizer, template: as of `as_tokens`.

    Raises:
        ValueError, TypeError: as `as_tokens`; an item longer than a model's context, or with an id
            beyond the vocabulary.
    """
    result = as_tokens(items, label, tokenizer, template)
    longest = context_length(model, before)
    for position, item in enumerate(result):
        if len(item.ids) > longest:
            raise ValueError(
                f"{label}[{position}] is {len(item.ids)} tokens long, and the model's context "
                f"{longest}: cut it into pieces"
            )
        try:
            check_vocabulary(model, collate([item], [0]))
        except ValueError as error:
            raise ValueError(f"{label}[{position}]: {error}") from None
    return result


def check_apart(sets: Mapping[str, Sequence[Any] | None]) -> None:
    """Raise ValueError where a text is in two sets, word for word.

    What is to be forgotten cannot go and stay: a base that is fine-tuned on the retain set would
    learn it. Unseen text says how well the model knows what it never saw, and of what it was
    trained on, to go or to stay, that is too well. Of tokens nothing is said: a vocabulary of few
    words makes the same ones of different texts.

    Args:
        sets: label -> a set as a caller gave it, or None.
    """
    given = [(label, items) for label, items in sets.items() if items is not None]
    for (label, items), (other, others) in combinations(given, 2):
        places = {_words(item): position for position, item in enumerate(others)}
        for position, item in enumerate(items):
            words = _words(item)
            if words is not None and words in places:
                raise ValueError(
                    f"{label}[{position}] is {other}[{places[words]}], too: expected sets that "
                    "share nothing"
                )


def _words(item: Any) -> tuple[str | None, str] | None:
    """(question, answer) of an example, (None, text) of a text, None of anything else."""
    if isinstance(item, Example):
        return item.question, item.answer
    return (None, item) if isinstance(item, str) else None
