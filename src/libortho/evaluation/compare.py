"""What only a comparison with the reference model tells: forget quality, and privleak."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from libortho.evaluation.entries import Entry, number
from libortho.evaluation.metrics import forget_quality, privleak
from libortho.evaluation.suite import Evaluation


def with_reference(evaluation: Evaluation, reference_logs: Mapping[str, Entry]) -> Evaluation:
    """The evaluation with what compares it to a model that never saw the forget set.

    That is `forget_quality` and `privleak` (of `mia_min_k`, as OpenUnlearning's).

    Args:
        reference_logs: the reference model's `logs`, or its TOFU_EVAL.json as read.

    Raises:
        ValueError: the two were measured on other forget questions.
    """
    logs, missing = dict(evaluation.logs), dict(evaluation.missing)
    for name, part in (("forget_quality", "forget_truth_ratio"), ("privleak", "mia_min_k")):
        missing.pop(name, None)
        logs.pop(name, None)
        if part not in logs:
            missing[name] = evaluation.missing.get(part, f"{part} was not measured")
        elif part not in reference_logs:
            missing[name] = f"the reference's logs have no {part}"
        else:
            logs[name] = _compared(name, logs[part], reference_logs[part])
    return dataclasses.replace(evaluation, logs=logs, missing=missing)


def _compared(name: str, own: Entry, reference: Entry) -> Entry:
    if name == "privleak":
        return {"agg_value": privleak(number(own["agg_value"]), number(reference["agg_value"]))}
    ours, theirs = own["value_by_index"], reference["value_by_index"]
    if set(ours) != set(theirs):
        raise ValueError(
            f"{len(ours)} forget questions against the reference's {len(theirs)}, or others: "
            "expected the same"
        )
    ratios = [[number(row["score"]) for row in rows.values()] for rows in (ours, theirs)]
    return {"agg_value": forget_quality(*ratios)}
