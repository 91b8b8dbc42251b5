"""What is compared with the reference model, and that it is the same questions."""

from __future__ import annotations

import json

import pytest
from scipy.stats import ks_2samp

from libortho.evaluation.compare import with_reference
from libortho.evaluation.suite import SuiteConfig, evaluate_suite


def test_with_reference(evaluation, other, tokenizer, data, values) -> None:
    reference = evaluate_suite(other, tokenizer, data, SuiteConfig(max_new_tokens=2)).logs
    stored = json.loads(json.dumps(reference))
    compared = with_reference(evaluation, stored)
    ratios = [values(logs["forget_truth_ratio"], "score") for logs in (evaluation.logs, reference)]
    assert compared.logs["forget_quality"]["agg_value"] == pytest.approx(ks_2samp(*ratios).pvalue)
    own, their = (1 - x["mia_min_k"]["agg_value"] for x in (evaluation.logs, reference))
    assert compared.logs["privleak"]["agg_value"] == pytest.approx((own - their) / their * 100)
    assert compared.missing == {}
    assert "privleak" not in evaluation.logs  # not changed in place
    stored["forget_truth_ratio"]["value_by_index"].pop("0")
    with pytest.raises(ValueError, match="5 forget questions against the reference's 4"):
        with_reference(evaluation, stored)
    del stored["forget_truth_ratio"]
    assert with_reference(evaluation, stored).missing == {
        "forget_quality": "the reference's logs have no forget_truth_ratio"
    }
