"""Is a generated answer language? Loops and broken words; its perplexity is the suite's.

No paper's: OpenUnlearning asks a classifier for gibberish (`forget_Q_A_gibberish`), which has to be
downloaded. These two are read off the text alone, and are to be compared with the same shares of
a retrained model's answers, not with 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Set
from functools import cache
from typing import Any

LOOP_TIMES = 3
"""A block of words said this often in a row can be a loop ..."""

LOOP_WORDS = 8
"""... if that is so many words at least: one word 8 times, two 4 times, three or more 3 times."""

_WORD = re.compile(r"\w+")
_LETTERS = re.compile(r"[^\W\d_]+")
_HYPHENATED = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)+")
_TRIPLE = re.compile(r"(.)\1\1")
_INNER_CAPITAL = re.compile(r"[^\W\d_A-Z][A-Z]")
_NAME_PREFIX = re.compile(r"(?:Mc|Mac|De|Di|Du|La|Le|Van|Fitz)(?=[A-Z])")


def has_loop(text: str) -> bool:
    """Whether some block of n >= 1 words is said k times in a row, k >= 3 and n * k >= 8.

    Words are compared without case and punctuation. A loop that varies a word each time round is
    not seen, nor one in a script that does not part its words.
    """
    words = [word.casefold() for word in _WORD.findall(text)]
    for size in range(1, len(words) // LOOP_TIMES + 1):
        times = max(LOOP_TIMES, math.ceil(LOOP_WORDS / size))
        run = 0
        for here, before in zip(words[size:], words, strict=False):
            run = run + 1 if here == before else 0
            if run == size * (times - 1):
                return True
    return False


def vocabulary(texts: Iterable[str]) -> frozenset[str]:
    """The words of some texts, without case, and their Porter stems: what `broken_words` knows."""
    words = {word.casefold() for text in texts for word in _LETTERS.findall(text)}
    return frozenset(words | {_stem(word) for word in words})


def token_words(tokens: Iterable[str]) -> list[str]:
    """The words that a tokenizer has a token of their own for: a dictionary that is at hand.

    Those tokens that begin a word (byte-level BPE marks them with U+0120, SentencePiece with
    U+2581) and are four letters or more, which leaves out most fragments. With SmolLM2's beside
    TOFU's own texts as the vocabulary, 4 to 7 in 100 of 1,600 TOFU answers about authors not in
    those texts have a word that `broken_words` reports; without them, 10 to 27. Of ordinary words
    with two letters swapped, 95 in 100 are still reported.
    """
    return [
        token[1:]
        for token in tokens
        if token[:1] in ("\u0120", "\u2581") and len(token) > 4 and token[1:].isalpha()
    ]


def broken_words(text: str, known: Set[str]) -> list[str]:
    """The words of a text that are none, in order.

    A run of letters is broken if neither it nor its Porter stem is in `known` and it
    - begins in lower case (a capital may begin a name, and names may be new), or
    - has a capital behind a small letter, other than a name's prefix ("Basilfku" is taken for
      a name, "BasilKu" is not, "McGee" is), or
    - has one letter three times on end, unless all in capitals.
    Runs joined by hyphens are broken as one if two of them are single letters ("Ku-A-z-B-L").
    Single letters are never broken by themselves. A misspelt name passes for a new one.

    Args:
        known: `vocabulary` of texts in the languages that the answers may be in; the more text, the
            fewer rare words are taken for broken.
    """
    broken, spelled = [], set[int]()
    for match in _HYPHENATED.finditer(text):
        parts = match.group().split("-")
        if sum(len(p) == 1 for p in parts) > 1 and not all(_is_known(p, known) for p in parts):
            broken.append((match.start(), match.group()))
            spelled |= set(range(*match.span()))
    for match in _LETTERS.finditer(text):
        word = match.group()
        if len(word) > 1 and match.start() not in spelled and not _is_known(word, known):
            begins = match.start() == 0 or not text[match.start() - 1].isdigit()
            if begins and _malformed(word):
                broken.append((match.start(), word))
    return [word for _, word in sorted(broken)]


def _malformed(word: str) -> bool:
    if word.isupper():
        return False
    return bool(
        word[0].islower()
        or _INNER_CAPITAL.search(_NAME_PREFIX.sub("", word, count=1))
        or _TRIPLE.search(word.casefold())
    )


def _is_known(word: str, known: Set[str]) -> bool:
    folded = word.casefold()
    return folded in known or _stem(folded) in known


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@cache
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))
