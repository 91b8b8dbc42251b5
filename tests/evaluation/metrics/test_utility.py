"""Model utility: which nine, and their harmonic mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hmean

from libortho.evaluation.metrics import UTILITY_PARTS, model_utility

PARTS = st.lists(st.floats(1e-3, 1), min_size=9, max_size=9)


@given(PARTS)
def test_model_utility_is_the_harmonic_mean(values: list[float]) -> None:
    parts = dict(zip(UTILITY_PARTS, values, strict=True))
    assert model_utility(parts) == pytest.approx(float(hmean(values)))


def test_model_utility_needs_the_nine() -> None:
    assert len(UTILITY_PARTS) == 9
    assert "ra_Q_A_Prob_normalised" in UTILITY_PARTS
    assert "retain_Q_A_Prob" in UTILITY_PARTS
    parts = dict.fromkeys(UTILITY_PARTS, 0.5)
    assert model_utility(parts | {"wf_Truth_Ratio": 0.0}) == 0.0
    with pytest.raises(ValueError, match=r"wf_Truth_Ratio=-0\.1"):
        model_utility(parts | {"wf_Truth_Ratio": -0.1})
    with pytest.raises(ValueError, match=r"missing \['ra_Q_A_ROUGE'\]"):
        model_utility({k: v for k, v in parts.items() if k != "ra_Q_A_ROUGE"})
    with pytest.raises(ValueError, match="forget_Q_A_Prob"):
        model_utility(parts | {"forget_Q_A_Prob": 0.5})
