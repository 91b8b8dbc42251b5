"""What the tests of evaluation share: a small data set, and a tiny model measured on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from libortho.data import Example
from libortho.evaluation.suite import Evaluation, SuiteConfig, evaluate_suite
from libortho.evaluation.suite_data import SuiteData

WORDS = ["who", "wrote", "where", "is", "the", "a", "red", "house", "in", "garden", "she", "he"]


@pytest.fixture(scope="session")
def examples() -> Callable[..., tuple[Example, ...]]:
    """`examples(count, seed, paraphrased=True)`: random questions and answers of a few words."""

    def make(count: int, seed: int, *, paraphrased: bool = True) -> tuple[Example, ...]:
        generator = np.random.default_rng(seed)

        def words(low: int, high: int) -> str:
            return " ".join(generator.choice(WORDS, generator.integers(low, high)))

        return tuple(
            Example(
                answer=words(2, 7),
                question=words(2, 6) + " ?",
                paraphrased_answer=words(2, 7) if paraphrased else None,
                perturbed_answers=tuple(words(2, 7) for _ in range(3)),
            )
            for _ in range(count)
        )

    return make


@pytest.fixture(scope="session")
def data(examples) -> SuiteData:  # type: ignore[no-untyped-def]
    return SuiteData(
        forget=examples(5, 0),
        retain=examples(7, 1),
        holdout=examples(4, 2, paraphrased=False),
        real_authors=examples(3, 3, paraphrased=False),
        world_facts=examples(3, 4, paraphrased=False),
        wikitext="the red house is in the garden . " * 3,
    )


@pytest.fixture
def model(tiny_llama):  # type: ignore[no-untyped-def]
    return tiny_llama(vocab_size=24)


@pytest.fixture
def other(tiny_llama):  # type: ignore[no-untyped-def]
    made = tiny_llama(vocab_size=24)
    for parameter in made.parameters():
        parameter.mul_(0.7)
    return made


@pytest.fixture
def evaluation(model, other, tokenizer, data) -> Evaluation:  # type: ignore[no-untyped-def]
    return evaluate_suite(model, tokenizer, data, SuiteConfig(max_new_tokens=6), pretrained=other)


@pytest.fixture(scope="session")
def values() -> Callable[[dict[str, Any], str], list[Any]]:
    """`values(entry, key)`: that value of each question."""
    return lambda entry, key: [row[key] for row in entry["value_by_index"].values()]
