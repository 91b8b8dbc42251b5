"""Attacks on what a model is said to have forgotten: one file a family, one config, one function.

Every attack is a function (subject, data, config, progress) -> Findings, listed in
`libortho.attacks.registry`. `libortho.attacks.suite` runs them over several models alike, since a
number means something only beside the same number of a model that never saw the secret.
"""

from libortho.attacks.common import AttackData, Findings, Score, Subject

__all__ = ["AttackData", "Findings", "Score", "Subject"]
