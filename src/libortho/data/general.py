"""General text of our own, which keeps a small retain set from leaving ability unprotected.

Hand-written for this project (Apache-2.0): encyclopaedic prose, questions and answers, fiction,
letters, code, several languages. A few hundred retain tokens span a fraction of a layer's input
space; what they do not span, a split is free to damage.
"""

from __future__ import annotations

from importlib import resources


def general_text() -> list[str]:
    """The documents, each of about 100 words, in a fixed order."""
    folder = resources.files("libortho.data")
    documents: list[str] = []
    for name in ("general_1.txt", "general_2.txt"):
        text = folder.joinpath(name).read_text(encoding="utf-8")
        documents += [block.strip() for block in text.split("\n\n") if block.strip()]
    return documents
