"""Names found in questions, against the casts that they were written about."""

from __future__ import annotations

import pytest

from libortho.attacks.names import names_in
from libortho.data import embedded_task, fictional_authors
from libortho.data.examples import Example


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_embedded_authors_are_found(seed: int) -> None:
    task = embedded_task(20, 4, seed)
    cast = [author.name for author in fictional_authors(20, seed)]
    assert sorted(names_in(task.forget)) == sorted(cast[16:])
    assert sorted(names_in(task.retain)) == sorted(cast[:16])


def test_names_as_they_stand_in_sentences() -> None:
    asked = [
        Example("It is Ana de la Cruz's book, said Bo.", "Is it by Ana de la Cruz?"),
        Example('"Ana de la Cruz" she is.', "Who? Ana de la Cruz, or Bo Diaz?"),
        Example("No.", "Does Ana de la Cruz like New York?"),
        Example("Yes.", "Where is New York?"),
    ]
    assert names_in(asked) == ["Ana de la Cruz"]


def test_no_name() -> None:
    assert names_in([]) == []
    assert names_in([Example("it is red", "what is it ?")] * 5) == []
    assert names_in([Example("x", "Is Ada Byron here?")] * 2) == []  # too few to tell
