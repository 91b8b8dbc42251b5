"""Model utility (TOFU: Maini et al. 2024, arXiv 2401.06121, section 2.2.4)."""

from __future__ import annotations

from collections.abc import Mapping

UTILITY_PARTS = tuple(
    f"{part}_{metric}"
    for part, probability in (
        ("retain", "Q_A_Prob"),
        ("ra", "Q_A_Prob_normalised"),
        ("wf", "Q_A_Prob_normalised"),
    )
    for metric in (probability, "Q_A_ROUGE", "Truth_Ratio")
)
"""The nine: probability, ROUGE-L recall and truth ratio on retain, real authors, world facts."""


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the nine aggregates, in [0, 1]; 0 where one of them is 0.

    Args:
        parts: the aggregate of each of `UTILITY_PARTS`, each in [0, 1].

    Raises:
        ValueError: other keys than these, or a negative value.
    """
    if set(parts) != set(UTILITY_PARTS):
        missing = sorted(set(UTILITY_PARTS) - set(parts))
        unknown = sorted(set(parts) - set(UTILITY_PARTS))
        raise ValueError(f"model utility needs its nine parts: missing {missing}, beside {unknown}")
    negative = [name for name, value in parts.items() if value < 0]
    if negative:
        raise ValueError(f"{negative[0]}={parts[negative[0]]}: expected at least 0")
    if not all(parts.values()):
        return 0.0
    return len(parts) / sum(1 / value for value in parts.values())
