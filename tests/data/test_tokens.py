"""Examples as tokens: prompts, templates, every form a caller may have, and batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libortho.data.examples import Example
from libortho.data.tokens import Tokens, as_tokens, batches, collate, encode, prompt_text

QUESTION = Example(answer="she wrote it .", question="who wrote it ?")


def words(tokenizer, item: Tokens) -> tuple[list[str], list[str]]:
    """The prompt's and the predicted tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(item.ids))
    return tokens[: item.prompt], tokens[item.prompt :]


# -- Tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(("ids", "prompt"), [((), 1), ((5,), 1), ((5, 6), 2), ((5, 6), 0)])
def test_nothing_to_predict(ids: tuple[int, ...], prompt: int) -> None:
    with pytest.raises(ValueError, match=rf"{len(ids)} token\(s\) with a prompt of {prompt}"):
        Tokens(ids, prompt)


def test_targets() -> None:
    assert Tokens((5, 6, 7)).targets == 2
    assert Tokens((5, 6, 7), 2).targets == 1


# -- encode ----------------------------------------------------------------------


def test_plain_question(tokenizer) -> None:
    assert prompt_text("who ?", "plain", tokenizer) == "Question: who ?\nAnswer:"
    prompt, answer = words(tokenizer, encode(QUESTION, tokenizer))
    assert prompt == ["<s>", "Question", ":", "who", "wrote", "it", "?", "Answer", ":"]
    assert answer == ["she", "wrote", "it", ".", "</s>"]


def test_chat_question(tokenizer) -> None:
    # The template writes its own special tokens: no <s> beside them.
    prompt, answer = words(tokenizer, encode(QUESTION, tokenizer, "chat"))
    assert prompt == ["<user>", "who", "wrote", "it", "?", "<assistant>"]
    assert answer == ["she", "wrote", "it", ".", "</s>"]


@pytest.mark.parametrize("text", ["the red house", Example(answer="the red house")])
def test_text_is_predicted_but_for_its_first_token(tokenizer, text) -> None:
    assert words(tokenizer, encode(text, tokenizer)) == (["<s>"], ["the", "red", "house"])


def test_text_too_short(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"'' is 1 token\(s\)"):
        encode("", tokenizer)


def test_without_an_end_token(tokenizer) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert words(endless, encode(QUESTION, endless))[1] == ["she", "wrote", "it", "."]


# -- as_tokens -------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        Tokens((1, 5, 6)),
        [1, 5, 6],
        (1, 5, 6),
        torch.tensor([1, 5, 6]),
        torch.tensor([[1, 5, 6]], dtype=torch.int32),
        np.array([1, 5, 6]),
        {"input_ids": [1, 5, 6]},
        {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": None},
        {"input_ids": [1, 5, 6], "labels": [1, 5, 6]},
        {"input_ids": [1, 5, 6], "labels": None},
    ],
    ids=repr,
)
def test_forms_of_ids(item) -> None:
    assert as_tokens([item], "forget") == [Tokens((1, 5, 6), 1)]


def test_labels_mark_the_prompt() -> None:
    item = {"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}
    assert as_tokens([item], "forget") == [Tokens((1, 5, 6, 7), 2)]
    with pytest.raises(ValueError, match=r"forget\[0\].*every label is -100"):
        as_tokens([{**item, "labels": [-100] * 4}], "forget")


def test_padding_is_no_target() -> None:
    ids, labels = [1, 5, 6, 7, 0, 0], [-100, 5, 6, 7, -100, -100]
    wanted = [Tokens((1, 5, 6, 7), 1)]
    assert as_tokens([{"input_ids": ids, "labels": labels}], "forget") == wanted
    mask = [1, 1, 1, 1, 0, 0]
    assert as_tokens([{"input_ids": ids, "attention_mask": mask}], "forget") == wanted
    left = {
        "input_ids": [0, 0, 1, 5, 6, 7],
        "attention_mask": [0, 0, 1, 1, 1, 1],
        "labels": [-100, -100, -100, -100, 6, 7],
    }
    assert as_tokens([left], "forget") == [Tokens((1, 5, 6, 7), 2)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [-100, 5, -100, 7]}, r"labels\[2\] is -100 between two"),
        ({"labels": [-100, 6, 7, 2]}, r"labels\[1\] is 6 and input_ids\[1\] is 5"),
        ({"labels": [1, 5, 6]}, r"different lengths: .*'labels': 3"),
        ({"attention_mask": [1, 1]}, r"different lengths: .*'attention_mask': 2"),
    ],
    ids=["between turns", "shifted", "fewer labels", "a shorter mask"],
)
def test_labels_that_are_not_of_the_ids(columns, message: str) -> None:
    with pytest.raises(ValueError, match=rf"forget\[0\]: .*{message}"):
        as_tokens([{"input_ids": [1, 5, 6, 7], **columns}], "forget")


def test_a_tensor_of_rows() -> None:
    assert as_tokens(torch.tensor([[1, 5], [1, 6]]), "x") == [Tokens((1, 5)), Tokens((1, 6))]


def test_text_with_a_tokenizer(tokenizer) -> None:
    items = ["the house", QUESTION]
    assert as_tokens(items, "forget", tokenizer, "chat") == [
        encode(item, tokenizer, "chat") for item in items
    ]


@pytest.mark.parametrize("items", [[], (), torch.zeros(0, 4, dtype=torch.long)])
def test_empty_set(items) -> None:
    with pytest.raises(ValueError, match="retain set is empty"):
        as_tokens(items, "retain")


@pytest.mark.parametrize("items", ["text", b"text", {"input_ids": [1, 2]}])
def test_one_item_instead_of_a_sequence(items) -> None:
    with pytest.raises(TypeError, match=rf"forget is one {type(items).__name__}"):
        as_tokens(items, "forget")


@pytest.mark.parametrize("item", ["some text", QUESTION])
def test_text_without_a_tokenizer(item) -> None:
    with pytest.raises(TypeError, match=r"forget\[1\]: .*tokenizer"):
        as_tokens([[1, 2], item], "forget")


@pytest.mark.parametrize(
    "item",
    [
        torch.tensor([0.5, 1.0]),
        [True, False],
        torch.ones(2, 2, dtype=torch.long),
        torch.ones(1, 1, 2, dtype=torch.long),
        None,
        object(),
        {"labels": [1, 2]},
    ],
    ids=lambda item: type(item).__name__,
)
def test_items_of_another_kind(item) -> None:
    with pytest.raises(TypeError, match=r"forget\[1\]: "):
        as_tokens([[1, 2], item], "forget")


@pytest.mark.parametrize("item", [[7], torch.tensor([7]), 7])
def test_a_sequence_of_one_token(item) -> None:
    with pytest.raises(ValueError, match=r"forget\[1\]: a sequence of 1 token"):
        as_tokens([[1, 2], item], "forget")


# -- batches ---------------------------------------------------------------------


def test_collate() -> None:
    items = [Tokens((1, 5, 6, 7), 2), Tokens((1, 9), 1), Tokens((3, 4, 8), 1)]
    batch = collate(items, [0, 2, 1])
    assert batch.index == [0, 2, 1]
    assert batch.ids.tolist() == [[1, 5, 6, 7], [3, 4, 8, 0], [1, 9, 0, 0]]
    assert batch.attention.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.predicts.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch.labels.tolist() == [6, 7, 4, 8, 9]
    assert batch.counts == [2, 2, 1]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    tokens_per_batch=st.integers(1, 200),
)
def test_batches_hold_every_item_once(lengths: list[int], tokens_per_batch: int) -> None:
    items = [Tokens(tuple(range(n)), 1) for n in lengths]
    found = list(batches(items, tokens_per_batch))
    assert sorted(i for batch in found for i in batch.index) == list(range(len(items)))
    assert all(len(b.index) == 1 or b.ids.numel() <= tokens_per_batch for b in found)
    widths = [batch.ids.shape[1] for batch in found]
    assert widths == sorted(widths)
    for batch in found:
        for row, index in enumerate(batch.index):
            kept = batch.ids[row][batch.attention[row].bool()].tolist()
            assert kept == list(items[index].ids)
