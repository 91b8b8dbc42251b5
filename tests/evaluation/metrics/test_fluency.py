"""Loops and broken words: what is one, and what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libortho.evaluation.metrics import broken_words, has_loop, token_words, vocabulary


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("and " * 8, True),
        ("and " * 7, False),
        ("of the " * 4, True),
        ("of the " * 3 + "of", False),
        ("of the book " * 3, True),
        ("of the book " * 2 + "of the", False),
        ("She wrote: Of the book, of THE book; of the 'book'!", True),
        ("a b c d e f g h " * 3, True),
        ("a b c d e f g h " * 2, False),
        ("She was born in Łódź, and in Łódź she lives; Łódź is in her books.", False),
        ("", False),
    ],
)
def test_has_loop(text: str, loop: bool) -> None:
    assert has_loop(text) is loop


@given(
    st.lists(st.sampled_from("abc"), max_size=20),
    st.lists(st.sampled_from("abc"), min_size=3, max_size=7),
)
def test_a_block_said_three_times_is_a_loop_anywhere(around: list[str], block: list[str]) -> None:
    assert has_loop(" ".join([*around, *block * 3, *around[::-1]]))


@given(st.lists(st.sampled_from("ab"), max_size=24))
def test_has_loop_by_search(words: list[str]) -> None:
    expected = any(
        words[i : i + n * k] == words[i : i + n] * k and i + n * k <= len(words)
        for n in range(1, 9)
        for k in range(3, 9)
        if n * k >= 8
        for i in range(len(words))
    )
    assert has_loop(" ".join(words)) is expected


KNOWN = vocabulary(["The author writes about gardens in Kuwait; e-mail, rock-n-roll."])


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("The authors wrote, writing of the Garden", ["wrote", "of"]),
        ("author writes about gardens", []),
        ("Authors in gardens", []),  # known by their stems
        ("writers garden", ["writers"]),
        ("Basil Mahfouz Al-Kuwaiti", []),  # a capital may begin a new name
        ("the Basilf-Ku-A-z-B-L garden", ["Basilf-Ku-A-z-B-L"]),
        ("e-mail about rock-n-roll", []),
        ("BasilfKu in Kuwait", ["BasilfKu"]),
        ("McGee, MacArthur, DeVito, NATO", []),
        ("Aaaah, the XIII", ["Aaaah"]),
        ("in the 1980s, the 21st", []),
        ("zzq the BasilfKu a-q-x qzz", ["zzq", "BasilfKu", "a-q-x", "qzz"]),
        ("Łódź, Čapek", []),
        ("", []),
    ],
)
def test_broken_words(text: str, broken: list[str]) -> None:
    assert broken_words(text, KNOWN) == broken


def test_vocabulary_is_of_words_without_case() -> None:
    assert vocabulary(["It's RED, 3rd x_y"]) >= {"it", "s", "red", "rd", "x", "y"}
    assert vocabulary([]) == frozenset()


def test_token_words_begin_a_word_and_are_long_enough() -> None:
    tokens = [
        "\u0120garden",
        "\u2581Haus",
        "garden",
        "\u0120gar",
        "\u0120abc1d",
        "\u0120",
        "xgarden",
    ]
    assert token_words(tokens) == ["garden", "Haus"]
