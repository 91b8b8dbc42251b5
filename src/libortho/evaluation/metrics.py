"""The metrics of TOFU (Maini et al. 2024, arXiv 2401.06121) that the main job reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libortho.data.examples import Example
from libortho.data.tokens import Template, encode
from libortho.scoring import sequence_nll


def truth_ratios(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "plain",
) -> list[float]:
    """Truth ratio of each example: mean P(wrong answer) / P(paraphrased right answer).

    P is the probability per token, P(a | q)^(1 / |a|), and the mean over wrong answers is the
    arithmetic one (TOFU, section 2.2.2). About 1 for a model that knows nothing of the matter,
    near 0 for one that knows.

    Raises:
        ValueError: an example has no paraphrased or no perturbed answers.
    """
    for example in examples:
        if not example.perturbed_answers or example.paraphrased_answer is None:
            raise ValueError(
                f"{example.question!r} has no paraphrased and perturbed answers: "
                "the truth ratio is not defined"
            )
    right = [Example(e.paraphrased_answer or "", e.question) for e in examples]
    wrong = [Example(p, e.question) for e in examples for p in e.perturbed_answers]
    tokens = [encode(e, tokenizer, template) for e in (*right, *wrong)]
    known = [math.exp(-float(nll.mean())) for nll in sequence_nll(model, tokens)]
    ratios, at = [], len(examples)
    for position, example in enumerate(examples):
        count = len(example.perturbed_answers)
        ratios.append(sum(known[at : at + count]) / count / max(known[position], 1e-12))
        at += count
    return ratios


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test on truth ratios (TOFU, section 2.2.3).

    Args:
        ratios: of the model under test, on the forget set.
        reference: of a model trained without the forget set, on the same examples.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(list(ratios), list(reference)).pvalue)
