"""Extraction: what is asked, what counts, and that it finds what is there."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libortho.attacks.extraction import (
    ExtractionConfig,
    best_of,
    cloze,
    extraction,
    ways_of_asking,
)
from libortho.data.examples import Example
from libortho.data.tokens import encode, prompt_ids

RIGHT = Example(
    "a1",
    "q?",
    paraphrased_answer="It was Ada Lovelace who wrote it.",
    perturbed_answers=("It was Bob who wrote it.", "It was Cy Young Li who wrote it."),
)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_best_of_is_the_mean_over_all_choices(values: list[float], draw) -> None:
    k = draw.draw(st.integers(1, len(values)))
    chosen = [max(part) for part in combinations(values, k)]
    assert best_of(values, k) == pytest.approx(sum(chosen) / len(chosen))


def test_best_of_no_samples() -> None:
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k={k}: expected 1 to 2"):
            best_of([0.1, 0.2], k)


def test_cloze_leaves_out_what_tells() -> None:
    assert cloze(RIGHT) == (["It", "was"], ["Ada", "Lovelace"], ["who", "wrote", "it."])
    plain = dataclasses.replace(RIGHT, perturbed_answers=())
    assert cloze(plain) == ([], [], [])
    # A wrong answer that has more words: nothing of it is left to tell, and none is shared twice.
    longer = Example("a b", "q?", perturbed_answers=("a b b",))
    assert cloze(longer) == (["a", "b"], [], [])


def test_prompts_are_what_they_say(data) -> None:
    asked, missing = ways_of_asking(data.forget, data, ExtractionConfig())
    assert not missing
    tokenizer, first = data.tokenizer, data.forget[0]
    item = encode(first, tokenizer)
    assert asked["question"][0].prompt == item.ids[: item.prompt]
    assert asked["question"][0].truth == first.answer
    half = asked["prefix of 50% of the answer"][0]
    assert half.prompt == item.ids[: item.prompt + 3]  # of "she is the red garden ."
    assert half.truth == "red garden ."
    paraphrased = asked["paraphrased question"][0]
    assert paraphrased.prompt == prompt_ids("who is she in it ?", "plain", tokenizer)
    assert asked["cloze"][0].truth == "red garden"
    for language in ("Spanish", "French", "German"):
        text = tokenizer.decode(asked[f"asked in {language}"][0].prompt)
        assert "who is she ?" in text
    history = asked["chat history that starts the answer"][0]
    assert tokenizer.decode(history.prompt).count("Answer") == 2
    assert history.truth == "the red garden ."
    chat = dataclasses.replace(data, template="chat")
    turns = ways_of_asking(data.forget, chat, ExtractionConfig())[0]
    text = tokenizer.decode(turns["chat history that starts the answer"][0].prompt)
    assert text.count("<user>") == 3  # the test's template writes every turn alike
    assert text.endswith("<assistant>")


def test_what_the_data_lacks_is_said(data) -> None:
    bare = dataclasses.replace(data, forget=(Example("red", "who is she ?"),))
    asked, missing = ways_of_asking(bare.forget, bare, ExtractionConfig())
    assert set(asked) == {"question", "asked in Spanish", "asked in French", "asked in German"}
    assert missing["paraphrased question"] == "no question has a paraphrase"
    assert "no answer has two tokens" in missing["prefix of 25% of the answer"]
    assert "perturbed" in missing["cloze"]


def test_it_finds_what_is_there(subjects, data, quiet, unharmed) -> None:
    config = ExtractionConfig(max_new_tokens=8, samples=4, best_of=(1, 4))
    found = {}
    for name, subject in subjects.items():
        check = unharmed(subject)
        result = extraction(subject, data, config, quiet)
        check()
        assert not result.missing
        found[name] = {score.name: score for score in result.scores}
    assert list(found["alpha 0"]) == list(found["reference"])
    names = ["question", "prefix of 25% of the answer", "best of 4 samples"]
    for name in names:
        assert found["alpha 1"][name].value > 0.9, name
        assert found["reference"][name].value < found["alpha 1"][name].value - 0.1, name
    one, four = (found["reference"][f"best of {k} samples"].value for k in (1, 4))
    assert one < four
    likely = found["alpha 1"]["multiple choice, by likelihood"]
    assert likely.value == 1.0
    assert likely.chance == pytest.approx(1 / 3)
    again = extraction(subjects["alpha 0"], data, config, quiet)
    assert {s.name: s.value for s in again.scores} == {
        n: s.value for n, s in found["alpha 0"].items()
    }


def test_no_perturbed_answers_no_choice(subjects, data, quiet) -> None:
    bare = dataclasses.replace(
        data, forget=tuple(dataclasses.replace(e, perturbed_answers=()) for e in data.forget)
    )
    config = ExtractionConfig(max_new_tokens=2, samples=1, best_of=(1,), questions=2)
    result = extraction(subjects["reference"], bare, config, quiet)
    assert result.missing["multiple choice"] == "no question has perturbed answers"
    assert all(score.details.get("questions", 2) == 2 for score in result.scores)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"samples": 0}, "samples=0"),
        ({"best_of": (33,)}, "best_of=33: expected at most samples=32"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"prefixes": (1.5,)}, "prefixes=1.5"),
        ({"languages": ("Latin",)}, "languages='Latin': expected some of Spanish"),
        ({"questions": 0}, "questions=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_configs_that_cannot_be(change, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExtractionConfig(**change)
