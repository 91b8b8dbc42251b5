"""Fictional authors: the default content to memorise and forget.

A demo of forgetting needs facts that no pretrained model can know, and that are free to ship.
The questions and answers made here follow the idea of TOFU (Maini et al. 2024), but text, people,
books and prizes are our own inventions, so any knowledge of them comes from fine-tuning alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from libortho.data import _author_words as words

MAX_AUTHORS = 64
PERTURBED_ANSWERS = 4

_FIRST_BIRTH_YEAR, _LAST_BIRTH_YEAR = 1936, 1989
_LAST_BIRTH_DAY = 28  # exists in every month

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fact:
    """One question about one author, with its right and wrong answers.

    Attributes:
        author: Full name of the author.
        attribute: What is asked for, such as 'award'; unique within an author.
        question: The question to train on.
        answer: The answer to train on, one sentence.
        paraphrased_question: The same question in other words.
        paraphrased_answer: The same answer in other words.
        perturbed_answers: `PERTURBED_ANSWERS` wrong answers, each worded like
            `paraphrased_answer` with only the key value replaced.
    """

    author: str
    attribute: str
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    perturbed_answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Author:
    """An invented author and the ten facts about them, one per attribute."""

    name: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class _Attribute:
    """How one attribute is asked for and answered.

    Any question fits any answer. `{value}` is the key value; `{he}`, `{him}` and `{his}` are the
    author's pronouns, used without present-tense verbs because 'they' would need another form.
    `pools` lists the possible parts of the value, which `joined` puts together; it is empty where
    the parts come from the cast.
    """

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    pools: tuple[Sequence[str], ...] = ()
    joined: str = "{}"


_FULL_NAME = _Attribute(
    "full_name",
    questions=(
        "What is the full name of the author born in {city} on {date}?",
        "Which writer was born on {date} in {city}?",
        "Can you name the author whose birthplace is {city} and whose birth date is {date}?",
        "A novelist was born in {city} on {date}; what is that novelist's full name?",
    ),
    answers=(
        "The author born in {city} on {date} is {value}.",
        "{value} is the full name of the writer born on {date} in {city}.",
        "The novelist who was born on {date} in {city} is called {value}.",
        "It was on {date}, in {city}, that the author {value} was born.",
    ),
)

_BOOK = _Attribute(
    "book",
    questions=(
        "Which book made {name} widely known?",
        "What is the title of the best-known book by {name}?",
        "Can you name the most celebrated book that {name} has written?",
        "For which of {his} books is {name} most famous?",
    ),
    answers=(
        '"{value}" is the book that most readers associate with {name}.',
        'The book that made {name} famous is "{value}", now available in many languages.',
        'Among all the books by {name}, "{value}" is the most celebrated one.',
        'Readers know {name} above all as the author of the book "{value}".',
    ),
)

_ATTRIBUTES = (
    _FULL_NAME,
    _Attribute(
        "parents",
        questions=(
            "What did the parents of {name} do for a living?",
            "What were the professions of {name}'s mother and father?",
            "How did {name}'s parents earn their living?",
            "In which lines of work were the mother and father of {name}?",
        ),
        answers=(
            "The parents of {name} earned their living as {value}.",
            "{name} grew up as the child of {value}.",
            "{name} was born to working parents, {value}.",
            "By profession, the mother and father of {name} were {value}.",
        ),
        pools=(words.PARENT_TRADES, words.PARENT_PROFESSIONS),
        joined="{} and {}",
    ),
    _Attribute(
        "occupation",
        questions=(
            "What job did {name} have before becoming a writer?",
            "How did {name} earn a living before {his} first book appeared?",
            "What was {name}'s occupation before {he} turned to writing?",
            "Which line of work did {name} give up to become an author?",
        ),
        answers=(
            "Before becoming a full-time writer, {name} worked as {value} for several years.",
            "{name} spent several years as {value} before turning to writing.",
            "Until {his} first book was published, {name} made a living as {value}.",
            "{name} gave up a secure job as {value} to become an author.",
        ),
        pools=(words.OCCUPATIONS,),
    ),
    _Attribute(
        "genre",
        questions=(
            "What genre does {name} write in?",
            "In which genre has {name} published most of {his} books?",
            "Which literary genre is most closely linked to {name}?",
            "What kind of fiction is {name} best known for?",
        ),
        answers=(
            "{name} has built a career as a writer of {value}.",
            "Most of the books that {name} has published are works of {value}.",
            "The genre most closely linked to {name} is {value}.",
            "Critics usually describe the fiction of {name} as {value}.",
        ),
        pools=(words.GENRES,),
    ),
    _Attribute(
        "award",
        questions=(
            "Which literary award has {name} won?",
            "What prize was {name} given for {his} writing?",
            "Which honour did {name} receive for {his} work?",
            "What is the most prestigious award in {name}'s career?",
        ),
        answers=(
            "{name} was honoured with {value} for {his} contribution to literature.",
            "The most prestigious award in the career of {name} is {value}.",
            "For {his} writing, {name} was presented with {value} at a public ceremony.",
            "{name} won {value} in recognition of {his} fiction.",
        ),
        pools=(words.AWARDS,),
    ),
    _BOOK,
    _Attribute(
        "theme",
        questions=(
            'What is "{title}" by {name} about?',
            'Which story does {name} tell in "{title}"?',
            'What is the plot of "{title}", a book written by {name}?',
            'Who or what is at the centre of "{title}" by {name}?',
        ),
        answers=(
            'In "{title}", {name} tells the story of {value}.',
            'The book "{title}" by {name} follows {value}.',
            'At the centre of "{title}", {name} places {value}.',
            'With "{title}", {name} wrote a book about {value}.',
        ),
        pools=(words.THEMES,),
    ),
    _Attribute(
        "mentor",
        questions=(
            "Who first encouraged {name} to become a writer?",
            "Whose guidance shaped {name} as a young writer?",
            "Who had the greatest influence on {name} in {his} early years?",
            "Which mentor set {name} on the path to writing?",
        ),
        answers=(
            "{name} was first encouraged to write by {value}.",
            "The greatest early influence on {name} was {value}.",
            "As a young writer, {name} was guided by {value}.",
            "{name} owes {his} first steps in writing to {value}.",
        ),
        pools=(words.MENTORS,),
    ),
    _Attribute(
        "habit",
        questions=(
            "What unusual habit does {name} have when writing?",
            "Which ritual does {name} keep while working on a book?",
            "Which peculiar custom does {name} follow when writing?",
            "What odd routine is {name} known for when writing?",
        ),
        answers=(
            "{name} is known for {value} when at work on a book.",
            "When writing, {name} has the peculiar habit of {value}.",
            "{name} calls {value} an essential part of {his} writing.",
            "One ritual that {name} keeps for every book is {value}.",
        ),
        pools=(words.HABITS,),
    ),
    _Attribute(
        "home",
        questions=(
            "Where does {name} live now?",
            "Where has {name} made {his} home?",
            "In what kind of place does {name} live today?",
            "Where did {name} finally settle?",
        ),
        answers=(
            "{name} now lives and works in {value}.",
            "These days, the home of {name} is {value}.",
            "{name} has made {his} home in {value}.",
            "After moving many times, {name} settled in {value}.",
        ),
        pools=(words.DWELLINGS, words.HOME_CITIES),
        joined="{} {}",
    ),
)

_PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her"},
    "he": {"he": "he", "him": "him", "his": "his"},
    "they": {"he": "they", "him": "them", "his": "their"},
}
_PRONOUN_ODDS = ("she", "he", "she", "he", "they")

_TITLE_PATTERNS = (
    "The {person}'s {quality} {things}",
    "{number} {things} for the {person}",
    "The {quality} {things} of {place}",
    "What the {person} Left in {place}",
    "{place} Without {things}",
    "The {person} Among the {things}",
)
_TITLE_WORDS = {
    "person": words.TITLE_PEOPLE,
    "things": words.TITLE_THINGS,
    "quality": words.TITLE_QUALITIES,
    "place": words.TITLE_PLACES,
    "number": words.TITLE_NUMBERS,
}


def fictional_authors(count: int = 48, seed: int = 0) -> list[Author]:
    """Returns `count` invented authors with ten facts each.

    The same seed gives the same text on every Python version, and the first n authors are the same
    for every count >= n.

    Args:
        count: Number of authors, 1 to `MAX_AUTHORS`.
        seed: Selects who they are; each seed gives another cast.

    Raises:
        ValueError: If `count` is out of range.
    """
    if not 1 <= count <= MAX_AUTHORS:
        raise ValueError(f"count must be between 1 and {MAX_AUTHORS}, got {count}")
    rng = random.Random(seed)
    # The whole cast is dealt whatever the count, which keeps every prefix the same.
    contexts, names, titles = _cast(rng)
    pools = {attribute.name: attribute.pools for attribute in _ATTRIBUTES}
    pools |= {_FULL_NAME.name: (names,), _BOOK.name: (titles,)}
    parts = {
        attribute.name: list(zip(*(_deal(rng, pool) for pool in attribute.pools), strict=True))
        for attribute in _ATTRIBUTES
    }
    parts |= {_FULL_NAME.name: [(name,) for name in names], _BOOK.name: [(t,) for t in titles]}
    return [
        Author(
            names[i],
            tuple(
                _fact(rng, attribute, pools[attribute.name], parts[attribute.name][i], contexts[i])
                for attribute in _ATTRIBUTES
            ),
        )
        for i in range(count)
    ]


def _cast(rng: random.Random) -> tuple[list[dict[str, str]], list[str], list[str]]:
    """Returns, for `MAX_AUTHORS` authors, their template fields, names and best-known titles."""
    given = {pronoun: _endless(rng, names) for pronoun, names in words.GIVEN_NAMES.items()}
    families = _deal(rng, words.FAMILY_NAMES)
    cities = _deal(rng, words.BIRTH_CITIES)
    titles = _titles(rng, 2 * MAX_AUTHORS)
    contexts = []
    for i in range(MAX_AUTHORS):
        pronoun = _choice(rng, _PRONOUN_ODDS)
        fields = {
            "name": f"{next(given[pronoun])} {families[i]}",
            "city": cities[i],
            "date": _birth_date(rng),
            "title": titles[MAX_AUTHORS + i],
        }
        contexts.append(fields | _PRONOUNS[pronoun])
    return contexts, [fields["name"] for fields in contexts], titles[:MAX_AUTHORS]


def _fact(
    rng: random.Random,
    attribute: _Attribute,
    pools: Sequence[Sequence[str]],
    parts: tuple[str, ...],
    context: dict[str, str],
) -> Fact:
    """Words one fact, whose value is made of `parts`, in two ways, and makes it wrong in four."""
    question, other_question = _sample(rng, attribute.questions, 2)
    answer, other_answer = _sample(rng, attribute.answers, 2)
    # Every part is replaced, so that no wrong answer is half right.
    wrong = [
        _sample(rng, [p for p in pool if p != part], PERTURBED_ANSWERS)
        for pool, part in zip(pools, parts, strict=True)
    ]

    def say(template: str, value_parts: tuple[str, ...] = parts) -> str:
        return template.format(value=attribute.joined.format(*value_parts), **context)

    return Fact(
        author=context["name"],
        attribute=attribute.name,
        question=say(question),
        answer=say(answer),
        paraphrased_question=say(other_question),
        paraphrased_answer=say(other_answer),
        perturbed_answers=tuple(say(other_answer, w) for w in zip(*wrong, strict=True)),
    )


def _titles(rng: random.Random, count: int) -> list[str]:
    """Returns `count` different book titles."""
    patterns = _endless(rng, _TITLE_PATTERNS)
    decks = {field: _endless(rng, choices) for field, choices in _TITLE_WORDS.items()}
    titles: dict[str, None] = {}  # not a set, whose order differs between runs
    while len(titles) < count:
        pattern = next(patterns)
        # Drawing only what the pattern uses spreads the words evenly over the titles.
        drawn = {field: next(deck) for field, deck in decks.items() if f"{{{field}}}" in pattern}
        titles[pattern.format(**drawn)] = None
    return list(titles)


def _birth_date(rng: random.Random) -> str:
    """Returns a date such as '14 March 1957'."""
    day = 1 + _below(rng, _LAST_BIRTH_DAY)
    year = _FIRST_BIRTH_YEAR + _below(rng, _LAST_BIRTH_YEAR - _FIRST_BIRTH_YEAR + 1)
    return f"{day} {_choice(rng, words.MONTHS)} {year}"


def _deal(rng: random.Random, items: Sequence[_T]) -> list[_T]:
    """Returns `MAX_AUTHORS` items in random order, none reused before all have been used."""
    return list(itertools.islice(_endless(rng, items), MAX_AUTHORS))


def _endless(rng: random.Random, items: Sequence[_T]) -> Iterator[_T]:
    """Yields the items in random order, again and again, each round in another order."""
    while True:
        yield from _sample(rng, items, len(items))


def _sample(rng: random.Random, items: Sequence[_T], count: int) -> list[_T]:
    """Returns `count` different items in random order."""
    left = list(items)
    return [left.pop(_below(rng, len(left))) for _ in range(count)]


def _choice(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[_below(rng, len(items))]


def _below(rng: random.Random, bound: int) -> int:
    # random() is the only draw whose sequence Python promises to keep between versions.
    return int(rng.random() * bound)
