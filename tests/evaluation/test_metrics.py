"""TOFU's metrics against their definitions, computed by hand."""

import math

import pytest
import torch

from libortho.data import Example, encode
from libortho.evaluation.metrics import forget_quality, truth_ratios


def probability(model, tokenizer, question: str, answer: str) -> float:
    """P(answer | question) per token, from the plain logits."""
    item = encode(Example(answer, question), tokenizer)
    logits = model(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
    steps = range(item.prompt, len(item.ids))
    return math.exp(sum(float(logits[i - 1, item.ids[i]]) for i in steps) / item.targets)


def test_truth_ratio_is_its_definition(tiny_llama, tokenizer) -> None:
    model = tiny_llama()
    examples = [
        Example("he is red", "who is he ?", None, "the house is red", ("she is red", "a garden")),
        Example("a house", "it is ?", None, "in a house", ("in the garden", "it", "she is")),
    ]
    expected = [
        sum(probability(model, tokenizer, e.question, w) for w in e.perturbed_answers)
        / len(e.perturbed_answers)
        / probability(model, tokenizer, e.question, e.paraphrased_answer)
        for e in examples
    ]
    got = truth_ratios(model, examples, tokenizer)
    assert got == pytest.approx(expected, rel=1e-4)


def test_truth_ratio_needs_both_kinds_of_answer(tiny_llama, tokenizer) -> None:
    with pytest.raises(ValueError, match="truth ratio is not defined"):
        truth_ratios(tiny_llama(), [Example("it", "who ?")], tokenizer)


def test_forget_quality_tells_equal_from_different() -> None:
    one = [i / 40 for i in range(40)]
    assert forget_quality(one, one) == pytest.approx(1.0)
    assert forget_quality(one, [x + 2 for x in one]) < 1e-6
