"""The fictional authors are reproducible, unambiguous and written in correct English."""

from __future__ import annotations

import hashlib
import itertools
import re

import pytest

from libortho.data import _author_words as words
from libortho.data.authors import (
    MAX_AUTHORS,
    PERTURBED_ANSWERS,
    Author,
    Fact,
    fictional_authors,
)

AUTHORS = fictional_authors(MAX_AUTHORS)
FACTS = [fact for author in AUTHORS for fact in author.facts]
# Other seeds reach combinations of words and templates that the default one does not.
MANY_FACTS = [
    fact for seed in range(4) for author in fictional_authors(seed=seed) for fact in author.facts
]
WORD_LISTS = {
    name: phrases for name, phrases in vars(words).items() if isinstance(phrases, tuple)
} | words.GIVEN_NAMES


def answers(fact: Fact) -> tuple[str, ...]:
    return (fact.answer, fact.paraphrased_answer, *fact.perturbed_answers)


def texts(fact: Fact) -> tuple[str, ...]:
    return (fact.question, fact.paraphrased_question, *answers(fact))


def shared_length(variants: list[str]) -> int:
    """Characters that all variants start with."""
    columns = zip(*variants, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def key_value(fact: Fact) -> str:
    """The part of the paraphrased answer that the perturbed answers replace."""
    variants = [fact.paraphrased_answer, *fact.perturbed_answers]
    start = shared_length(variants)
    end = shared_length([variant[start:][::-1] for variant in variants])
    return fact.paraphrased_answer[start : len(fact.paraphrased_answer) - end]


def titles(author: Author) -> tuple[str, ...]:
    quoted = {
        fact.attribute: re.findall(r'"(.+?)"', fact.answer)
        for fact in author.facts
        if fact.attribute in ("book", "theme")
    }
    (book,), (other,) = quoted["book"], quoted["theme"]
    return book, other


def test_same_text_everywhere() -> None:
    # Changes with any edit of words or templates, and must not change with the Python version.
    text = "\n".join(text for fact in FACTS for text in texts(fact))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "7fbadcb840a38cc837d1f35a7432f7a6901ba2e4cb844bf93b9a82507b013c36"
    )


def test_seed_decides() -> None:
    assert fictional_authors(5, seed=3) == fictional_authors(5, seed=3)
    assert fictional_authors(5, seed=3) != fictional_authors(5, seed=4)
    assert fictional_authors() == fictional_authors(48, seed=0)


@pytest.mark.parametrize("count", [1, 2, 47, 48, 60])
def test_prefix_stable(count: int) -> None:
    assert fictional_authors(count) == AUTHORS[:count]


@pytest.mark.parametrize("count", [-1, 0, MAX_AUTHORS + 1])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and {MAX_AUTHORS}, got {count}$"):
        fictional_authors(count)


def test_ten_attributes_each() -> None:
    attributes = [fact.attribute for fact in AUTHORS[0].facts]
    assert len(set(attributes)) == len(attributes) == 10
    for author in AUTHORS:
        assert [fact.attribute for fact in author.facts] == attributes
        assert {fact.author for fact in author.facts} == {author.name}


def test_names_are_unique() -> None:
    assert len({author.name for author in AUTHORS}) == len(AUTHORS)
    assert len({author.name.split()[-1] for author in AUTHORS}) == len(AUTHORS)
    assert all(len(author.name.split()) in (2, 3) for author in AUTHORS)


def test_titles_are_unique() -> None:
    all_titles = [title for author in AUTHORS for title in titles(author)]
    assert len(set(all_titles)) == len(all_titles) == 2 * len(AUTHORS)


def test_questions_are_unique_and_name_the_author() -> None:
    questions = [q for fact in FACTS for q in (fact.question, fact.paraphrased_question)]
    assert len(set(questions)) == len(questions)
    for fact in FACTS:
        for question in (fact.question, fact.paraphrased_question):
            assert (fact.author in question) == (fact.attribute != "full_name")


def test_answers_name_the_author() -> None:
    for fact in FACTS:
        assert fact.author in fact.answer
        assert fact.author in fact.paraphrased_answer


def test_perturbed_answers_are_wrong_and_distinct() -> None:
    for fact in MANY_FACTS:
        assert len(fact.perturbed_answers) == PERTURBED_ANSWERS >= 3
        assert fact.answer != fact.paraphrased_answer
        assert len(set(answers(fact))) == 2 + PERTURBED_ANSWERS
        key = key_value(fact)
        assert len(key) >= 3
        assert key in fact.answer
        assert not any(key in wrong for wrong in fact.perturbed_answers)


def test_no_question_gives_its_answer_away() -> None:
    for fact in MANY_FACTS:
        assert key_value(fact) not in fact.question
        assert key_value(fact) not in fact.paraphrased_question


def test_values_and_phrasings_vary() -> None:
    for attribute in {fact.attribute for fact in FACTS}:
        facts = [fact for fact in FACTS[:480] if fact.attribute == attribute]
        assert len({key_value(fact) for fact in facts}) >= 25
        # The words left once the author's own are gone tell the templates apart.
        openings = {fact.question.replace(fact.author, "")[:12] for fact in facts}
        assert len(openings) >= 3


@pytest.mark.parametrize("name", WORD_LISTS)
def test_word_lists(name: str) -> None:
    phrases = WORD_LISTS[name]
    assert len(set(phrases)) == len(phrases)
    assert all(phrase.isascii() and phrase == phrase.strip() != "" for phrase in phrases)
    if name in {"PARENT_TRADES", "PARENT_PROFESSIONS", "OCCUPATIONS", "GENRES", "AWARDS"} | {
        "THEMES", "MENTORS", "HABITS", "DWELLINGS", "BIRTH_CITIES", "HOME_CITIES"
    }:  # fmt: skip
        assert len(phrases) >= 25
        assert not any(a in b for a in phrases for b in phrases if a != b)


def test_words_per_answer() -> None:
    for fact in MANY_FACTS:
        for answer in (fact.answer, fact.paraphrased_answer):
            assert 10 <= len(answer.split()) <= 22, answer


def test_punctuation() -> None:
    for fact in MANY_FACTS:
        for text in texts(fact):
            assert not re.search(r"\s\s|[{}]|\s[,.;?]|^\s|\s$|[^\x20-\x7e]", text), text
            assert text[0].isupper() or text[0] == '"', text
            assert text.count('"') % 2 == 0, text
        for question in (fact.question, fact.paraphrased_question):
            assert question.endswith("?")
            assert question.count("?") == 1
        for answer in answers(fact):
            assert re.search(r'[^.?]\.$|"\.$', answer), answer
            assert answer.count(".") == 1, answer


def test_indefinite_articles() -> None:
    # By spelling alone; the word lists avoid words such as 'hour' or 'university'.
    for fact in MANY_FACTS:
        for text in texts(fact):
            for article, initial in re.findall(r"\b([Aa]n?) (\w)", text):
                assert (article.lower() == "an") == (initial.lower() in "aeiou"), text


def test_one_pronoun_per_author() -> None:
    groups = {"she": {"she", "her"}, "he": {"he", "him", "his"}, "they": {"they", "them", "their"}}
    seen = set()
    for author in AUTHORS:
        found = {
            pronoun
            for fact in author.facts
            if fact.attribute != "parents"  # has 'their' for the parents
            for text in texts(fact)
            for pronoun, forms in groups.items()
            if forms & set(re.findall(r"\w+", text.lower()))
        }
        assert len(found) <= 1, (author.name, found)
        seen |= found
    assert seen == set(groups)
