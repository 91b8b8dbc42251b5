"""The embedded general text: prose, and questions of common knowledge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from libortho.data.general import general_questions, general_text
from libortho.given import GENERAL_TOKENS, general_tokens


def test_questions_are_asked_once_and_answered() -> None:
    examples = general_questions()
    questions = [example.question or "" for example in examples]
    assert len(set(questions)) == len(questions) >= 100
    assert all(question.endswith("?") for question in questions)
    assert all(example.answer.endswith(".") for example in examples)


@pytest.mark.parametrize("name", ["real_authors_perturbed.json", "world_facts_perturbed.json"])
def test_no_question_is_one_that_a_model_is_judged_by(repository: Path, name: str) -> None:
    folder = repository.parent / "shared" / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip("TOFU's files are not beside the repository")
    judged = [json.loads(line) for line in (folder / name).read_text().splitlines() if line]
    asked = {(example.question or "").lower() for example in general_questions()}
    assert not asked & {record["question"].lower() for record in judged}
    if name.startswith("real_authors"):
        ours = " ".join(f"{e.question} {e.answer}" for e in general_questions())
        people = {record["answer"] for record in judged} - {"Russia", "Ireland", "Colombia"}
        assert not [person for person in people if person in ours]


@pytest.mark.parametrize("name", ["real_authors_perturbed.json", "world_facts_perturbed.json"])
def test_no_text_answers_what_a_model_is_judged_by(repository: Path, name: str) -> None:
    """The right answer beside most of its question's words, within two sentences or lines."""
    folder = repository.parent / "shared" / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip("TOFU's files are not beside the repository")
    judged = [json.loads(line) for line in (folder / name).read_text().splitlines() if line]
    said = [*general_text(), *(f"{e.question}\n{e.answer}" for e in general_questions())]
    sentences = [re.split(r"(?<=[.!?])\s+|\n", text) for text in said]
    seen = [_words(" ".join(part[i : i + 2])) for part in sentences for i in range(len(part))]
    told = []
    for record in judged:
        answer = _words(record["answer"])
        asked = _words(record["question"]) - answer
        told += [(record, s) for s in seen if answer <= s and len(asked & s) >= 0.6 * len(asked)]
    assert len(seen) > 1000
    assert not told


def _words(text: str) -> set[str]:
    little = "the a an of in is was who what which where when did does do for to by on and with as"
    return set(re.findall(r"\w+", text.lower())) - set(little.split())


def test_questions_are_protected_where_some_are_asked(tiny_llama, tokenizer) -> None:
    model = tiny_llama()
    prose = general_tokens(model, None, tokenizer, None)
    both = general_tokens(model, None, tokenizer, "plain")
    assert both[: len(prose)] == prose
    assert all(item.prompt == 1 for item in prose)
    assert sum(len(item.ids) for item in prose) < 1.2 * GENERAL_TOKENS
    assert len(prose) < len(general_text())
    asked = both[len(prose) :]
    assert asked
    assert all(item.prompt > 1 for item in asked)
    longest = model.config.max_position_embeddings
    assert max(len(item.ids) for item in both) <= longest
