"""Text of a stream: always the text of all tokens together, up to a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from libortho.serve.text import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes, and 256 a special token: what splits characters most."""

    def decode(self, ids, **_: object) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def stream(text: str, stop: list[str]) -> tuple[list[str], bool]:
    made = TextStream(Bytes(), stop)  # type: ignore[arg-type]
    parts = []
    for byte in text.encode():
        parts.append(made.push(byte))
        if made.stopped:
            return parts, True
    return [*parts, made.finish()], made.stopped


def expected(text: str, stop: list[str]) -> str:
    """Cut before the stop string that is complete first (the earliest beginning, among those)."""
    for end in range(len(text) + 1):
        found = [text.find(s) for s in stop if s in text[:end]]
        if found:
            return text[: min(found)]
    return text


ALPHABET = "abé漢🎈 "


@given(
    st.text(ALPHABET, max_size=30), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)
)
def test_pieces_join_to_the_text_before_the_stop(text: str, stop: list[str]) -> None:
    parts, stopped = stream(text, stop)
    assert "".join(parts) == expected(text, stop)
    assert stopped == any(s in text for s in stop)


def test_nothing_of_a_stop_string_is_sent_before_it_is_known() -> None:
    made = TextStream(Bytes(), ["stop"])  # type: ignore[arg-type]
    assert "".join(made.push(b) for b in b"a sto") == "a "
    assert made.push(ord("n")) == "ston"


def test_a_broken_character_at_the_end_comes_as_it_is() -> None:
    made = TextStream(Bytes())  # type: ignore[arg-type]
    assert made.push("é".encode()[0]) == ""
    assert made.finish() == "\ufffd"


def test_words_keep_their_spaces_and_special_tokens_are_left_out(tokenizer) -> None:
    text = "she is in the red house . "
    ids = tokenizer(text + "</s> it").input_ids
    made = TextStream(tokenizer)
    parts = [made.push(i) for i in ids]
    assert "".join(parts) + made.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert parts[2] == " is"
