"""General text of our own, which keeps a small retain set from leaving ability unprotected.

Hand-written for this project (Apache-2.0): encyclopaedic prose, questions and answers, fiction,
letters, code, several languages. A few hundred retain tokens span a fraction of a layer's input
space; what they do not span, a split is free to damage.
"""

from __future__ import annotations

from importlib import resources

from libortho.data.examples import Example


def general_text() -> list[str]:
    """The documents, each of about 100 words, in a fixed order."""
    return [block for name in ("general_1.txt", "general_2.txt") for block in _blocks(name)]


def general_questions() -> list[Example]:
    """Common knowledge, asked for and answered in a sentence, in a fixed order.

    For a forget set of questions: taught not to answer those about some author's books, a model
    says less of who wrote Dracula as well.
    """
    pairs = (block.split("\n") for block in _blocks("general_questions.txt"))
    return [Example(question=question, answer=answer) for question, answer in pairs]


def _blocks(name: str) -> list[str]:
    text = resources.files("libortho.data").joinpath(name).read_text(encoding="utf-8")
    return [block.strip() for block in text.split("\n\n") if block.strip()]
