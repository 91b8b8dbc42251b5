"""How much of an answer a model can complete by itself, from teacher-forced greedy choices.

Both are taken without the last predicted token, the end of sequence, as OpenUnlearning does.
"""

from __future__ import annotations

from collections.abc import Sequence


def exact_memorization(greedy: Sequence[bool]) -> float | None:
    """Share of tokens that are the model's first choice (Tirumala et al. 2022, arXiv 2205.10770).

    Args:
        greedy: for each predicted token, end of sequence included, whether it is the model's first
            choice given all tokens before it.

    Returns:
        In [0, 1]; None for an answer of no token but the end of sequence.
    """
    answer = list(greedy)[:-1]
    return sum(answer) / len(answer) if answer else None


def extraction_strength(greedy: Sequence[bool]) -> float:
    """1 - (shortest prefix whose rest is recited) / tokens (Carlini et al. 2021, 2012.07805).

    OpenUnlearning's definition, which never tries the whole answer as the prefix: where even the
    last token is wrong it gives 1 / tokens rather than 0. An answer of no token but the end of
    sequence gives 0.

    Args:
        greedy: as in `exact_memorization`.

    Returns:
        In [0, 1].
    """
    answer = list(greedy)[:-1]
    if not answer:
        return 0.0
    recited = next((i for i, hit in enumerate(reversed(answer)) if not hit), len(answer))
    return max(recited, 1) / len(answer)
