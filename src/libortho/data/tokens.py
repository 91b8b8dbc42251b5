"""Examples in tokens: what is fed to a model, and which part of it counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from libortho.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["plain", "chat"]

IGNORED = -100
"""The label of a token that is not predicted, in Hugging Face's data sets."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence.

    Attributes:
        ids: token ids, prompt first.
        prompt: how many of them are only read, never predicted (at least 1: the first token has
            nothing to be predicted from).
    """

    ids: tuple[int, ...]
    prompt: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.prompt < len(self.ids):
            raise ValueError(
                f"a sequence of {len(self.ids)} token(s) with a prompt of {self.prompt}: expected "
                "at least one token of prompt and one that is predicted"
            )

    @property
    def targets(self) -> int:
        """Number of predicted tokens."""
        return len(self.ids) - self.prompt


def prompt_text(question: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """A question as the text that an answer follows.

    "plain" is `Question: ...\\nAnswer:`, for base models and for TOFU as it is used here; "chat" is
    the tokenizer's own chat template with the assistant's turn opened.
    """
    if template == "chat":
        turn = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    return f"Question: {question}\nAnswer:"


def prompt_ids(
    question: str, template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """`prompt_text` in tokens: what `encode` puts before an answer."""
    special = template == "plain"  # a chat template writes its own special tokens
    text = prompt_text(question, template, tokenizer)
    return tuple(tokenizer(text, add_special_tokens=special).input_ids)


def encode(
    example: Example | str, tokenizer: PreTrainedTokenizerBase, template: Template = "plain"
) -> Tokens:
    """Tokens of an example.

    A question-answer pair is predicted on its answer and the end-of-sequence token; a text (or a
    bare string) on all tokens but the first.

    Raises:
        ValueError: a text of fewer than two tokens.
    """
    if isinstance(example, str):
        example = Example(answer=example)
    if example.question is None:
        ids = tokenizer(example.answer).input_ids
        if len(ids) < 2:
            raise ValueError(f"text {example.answer!r} is {len(ids)} token(s): expected at least 2")
        return Tokens(tuple(ids))
    head = prompt_ids(example.question, template, tokenizer)
    lead = "" if template == "chat" else " "
    tail = tokenizer(lead + example.answer, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Tokens((*head, *tail, *end), len(head))


def as_tokens(
    items: Sequence[Any],
    label: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: Template = "plain",
) -> list[Tokens]:
    """Whatever a caller has, as `Tokens`.

    Args:
        items: `Tokens`, `Example`s or strings (these two need a tokenizer), 1-D integer tensors or
            sequences of ids, or mappings with "input_ids" and, optionally, "attention_mask" (0 at
            padding, which is dropped) and "labels" (-100 before the answer, which marks the prompt,
            and behind it, where tokens are dropped).
        label: what to call it in an error ("forget", "retain").

    Raises:
        ValueError: empty, an item of fewer than two tokens, or labels that are not its ids between
            a prompt and padding.
        TypeError: text without a tokenizer, or an item of another kind.
    """
    if isinstance(items, (str, bytes, Mapping)):
        raise TypeError(f"{label} is one {type(items).__name__}: expected a sequence of them")
    if len(items) == 0:
        raise ValueError(f"the {label} set is empty: expected at least one sequence")
    result = []
    for position, item in enumerate(items):
        try:
            result.append(_one(item, tokenizer, template))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{label}[{position}]: {error}") from None
    return result


def holds_question(items: Sequence[Any]) -> bool:
    """Whether a template has, or may have had, a part in any of the items of `as_tokens`.

    It has none in a text. Tokens may have been made with one.
    """
    return any(
        not isinstance(item, str) and not (isinstance(item, Example) and item.question is None)
        for item in items
    )


def _one(item: Any, tokenizer: PreTrainedTokenizerBase | None, template: Template) -> Tokens:
    if isinstance(item, Tokens):
        return item
    if isinstance(item, (str, Example)):
        if tokenizer is None:
            raise TypeError("text was given without a tokenizer: pass tokenizer=, or token ids")
        return encode(item, tokenizer, template)
    if not isinstance(item, Mapping):
        return Tokens(tuple(_integers(item, "ids")))
    if "input_ids" not in item:
        raise TypeError(f"a mapping without 'input_ids'; its keys: {', '.join(map(str, item))}")
    columns = {"input_ids": _integers(item["input_ids"], "ids")}
    for key in ("attention_mask", "labels"):
        if item.get(key) is not None:
            columns[key] = _integers(item[key], key)
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of different lengths: {lengths}")
    mask = columns.pop("attention_mask", None)
    if mask is not None:
        attended = [i for i, kept in enumerate(mask) if kept]
        columns = {key: [column[i] for i in attended] for key, column in columns.items()}
    return _labelled(columns["input_ids"], columns.get("labels"))


def _labelled(ids: list[int], labels: list[int] | None) -> Tokens:
    if labels is None:
        return Tokens(tuple(ids))
    counted = [i for i, label in enumerate(labels) if label != IGNORED]
    if not counted:
        raise ValueError(f"every label is {IGNORED}: expected one that is predicted")
    first, last = counted[0], counted[-1]
    if last - first >= len(counted):
        gap = next(i for i in range(first, last) if labels[i] == IGNORED)
        raise ValueError(
            f"labels[{gap}] is {IGNORED} between two that are predicted: expected a prompt and one "
            "answer; give each turn of a conversation as a sequence of its own"
        )
    for i in counted:
        if labels[i] != ids[i]:
            raise ValueError(
                f"labels[{i}] is {labels[i]} and input_ids[{i}] is {ids[i]}: expected the same "
                "(labels are not shifted)"
            )
    return Tokens(tuple(ids[: last + 1]), max(1, first))


def _integers(values: Any, what: str) -> list[int]:
    """One row of integers, in whatever it comes."""
    try:
        found = torch.as_tensor(values)
    except RuntimeError:
        raise TypeError(f"a {type(values).__name__}: expected text or token ids") from None
    if (
        found.is_floating_point()
        or found.dtype == torch.bool
        or found.dim() > 2
        or (found.dim() == 2 and found.shape[0] != 1)
    ):
        raise TypeError(
            f"{what} of shape {tuple(found.shape)}, {found.dtype}: expected one row of integers"
        )
    return [int(value) for value in found.reshape(-1).tolist()]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences.

    Attributes:
        index: which items of the list these rows are.
        ids: (rows, length) int64.
        attention: (rows, length) int64, 1 where a token stands.
        predicts: (rows, length) bool, True at a position whose *next* token is predicted.
        labels: (number of True in `predicts`,) int64, those next tokens in row-major order.
        counts: predicted tokens per row.
    """

    index: list[int]
    ids: Tensor
    attention: Tensor
    predicts: Tensor
    labels: Tensor
    counts: list[int]


def batches(items: Sequence[Tokens], tokens_per_batch: int = 1024) -> Iterator[Batch]:
    """Batches of similar length, shortest first, of at most about `tokens_per_batch` tokens.

    Padding is to the right, so position 0 is every sequence's first token.
    """
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    rows: list[int] = []
    for i in order:
        if rows and (len(rows) + 1) * len(items[i].ids) > tokens_per_batch:
            yield collate(items, rows)
            rows = []
        rows.append(i)
    if rows:
        yield collate(items, rows)


def collate(items: Sequence[Tokens], rows: list[int]) -> Batch:
    """Right-pad the given items into one `Batch`. Padding ids are 0 and never attended to."""
    length = max(len(items[i].ids) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention = torch.zeros_like(ids)
    predicts = torch.zeros(len(rows), length, dtype=torch.bool)
    labels: list[int] = []
    for row, i in enumerate(rows):
        item = items[i]
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        attention[row, : len(item.ids)] = 1
        predicts[row, item.prompt - 1 : len(item.ids) - 1] = True
        labels += item.ids[item.prompt :]
    counts = [items[i].targets for i in rows]
    return Batch(list(rows), ids, attention, predicts, torch.tensor(labels), counts)
