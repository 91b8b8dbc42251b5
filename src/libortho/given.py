"""What a split is given, checked against the models before any work."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from libortho.data.examples import Example
from libortho.data.general import general_text
from libortho.data.tokens import Template, Tokens, as_tokens, collate
from libortho.scoring import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def _context(model: PreTrainedModel, before: PreTrainedModel | None) -> int:
    """Tokens that both models take at once; what they do not say is without limit."""
    told = [getattr(one.config, "max_position_embeddings", None) for one in (model, before) if one]
    return min((context for context in told if context), default=sys.maxsize)


def general_tokens(
    model: PreTrainedModel, before: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """The embedded general text, each paragraph as far as the models' context goes."""
    longest = _context(model, before)
    items = as_tokens(general_text(), "general text", tokenizer)
    return [Tokens(item.ids[:longest], item.prompt) for item in items]


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
    longest = _context(model, before)
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


def check_apart(forget: Sequence[Any], others: Mapping[str, Sequence[Any] | None]) -> None:
    """Raise ValueError where a text that is to be forgotten is in another set, word for word.

    It cannot go and stay. A base that is fine-tuned on the retain set would learn it, and as unseen
    text it would say that what the model knows of it is what it should know. Of tokens nothing is
    said: a vocabulary of few words makes the same ones of different texts.

    Args:
        forget: the forget set, as a caller gave it.
        others: label -> set, or None.
    """
    for label, items in others.items():
        if items is None:
            continue
        places = {_words(item): position for position, item in enumerate(items)}
        for position, item in enumerate(forget):
            words = _words(item)
            if words is not None and words in places:
                raise ValueError(
                    f"forget[{position}] is {label}[{places[words]}], too: expected sets that "
                    "share nothing"
                )


def _words(item: Any) -> tuple[str | None, str] | None:
    """(question, answer) of an example, (None, text) of a text, None of anything else."""
    if isinstance(item, Example):
        return item.question, item.answer
    return (None, item) if isinstance(item, str) else None
