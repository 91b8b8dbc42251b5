"""The names that a set of questions is about: the strings that an attacker would most like to have.

Found, not given: a question file has no field for them. In TOFU and in the embedded authors a name
stands in almost every question about its bearer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from libortho.data.examples import Example

MOST_WORDS = 4
LEAST_EXAMPLES = 3
_NOTABLE = 0.4
"""Of the most frequent name's examples: a string in fewer is a place or a prize, not a subject."""
_NEARLY_ALL = 0.7
"""A longer string wins over a part of it that stands in at most 1 / 0.7 times as many examples."""


def names_in(examples: Sequence[Example]) -> list[str]:
    """Runs of capitalised words that many examples share, the most frequent first.

    One at a time: the string in most of the examples, made as long as it can be; the examples that
    have it are then put aside. Strings in fewer than 3 examples, or in much fewer than the first
    one, are no names.
    """
    left = [set(_strings(f"{e.question or ''} {e.answer}")) for e in examples]
    names: list[str] = []
    most = 0
    while left:
        counts = Counter(string for strings in left for string in strings)
        if not counts:
            break
        top = max(counts.values())
        most = most or top
        if top < max(LEAST_EXAMPLES, _NOTABLE * most):
            break
        parts = [s for s, count in counts.items() if count == top]
        start = max(parts, key=lambda s: (len(s.split()), s))
        longer = [s for s, n in counts.items() if start in s and n >= _NEARLY_ALL * top]
        name = max(longer, key=lambda s: (len(s.split()), counts[s], s))
        names.append(name)
        left = [strings for strings in left if start not in strings]
    return names


_PARTICLES = frozenset(
    ["al", "bin", "da", "de", "del", "der", "di", "du", "el", "la", "le", "ter", "van", "von"]
)
"""Words that may stand inside a name in small letters."""

_PUNCTUATION = "\"'\u2018\u2019\u201c\u201d.,;:?!()"


def _strings(text: str) -> Iterator[str]:
    """Every run of 2 to 4 words of a name, and every part of it that is one."""
    run: list[str] = []
    for raw in [*text.split(), ""]:
        word = raw.strip(_PUNCTUATION).removesuffix("'s").removesuffix("\u2019s")
        # "al-Kuwaiti" as well as "Al-Kuwaiti".
        capital = any(part[:1].isupper() for part in word.split("-"))
        fits = capital or (bool(run) and word in _PARTICLES)
        if fits:
            run.append(word)
        # Punctuation and a possessive end a run.
        if not fits or not raw.endswith(word):
            for size in range(2, MOST_WORDS + 1):
                for start in range(len(run) - size + 1):
                    part = run[start : start + size]
                    if part[0] not in _PARTICLES and part[-1] not in _PARTICLES:
                        yield " ".join(part)
            run = []
