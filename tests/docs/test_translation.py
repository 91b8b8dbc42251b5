"""The Chinese twins of pages keep step: a change of one that is missing in the other fails here."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

TWINS = {"README.md": "README.zh.md", "docs/quickstart.md": "docs/quickstart.zh.md"}
NUMBER = re.compile(r"\d[\d,.]*\d|\d")


def tokens(text: str) -> list[Token]:
    """All tokens of a page, those within paragraphs and table cells too."""
    flat = []
    for token in MarkdownIt().enable("table").parse(text):
        flat += [token, *(token.children or [])]
    return flat


def skeleton(text: str) -> list[str]:
    """What the page is built of, in order: headings, paragraphs, rows, items, code blocks."""
    kinds = {"heading_open", "paragraph_open", "tr_open", "list_item_open", "fence", "code_block"}
    return [f"{token.type} {token.tag}" for token in tokens(text) if token.type in kinds]


def code(text: str) -> list[str]:
    """The code blocks, with their languages."""
    return [t.info + "\n" + t.content for t in tokens(text) if t.type in ("fence", "code_block")]


def targets(text: str) -> Counter[str]:
    """Where links and pictures lead."""
    found = [token.attrGet("href") or token.attrGet("src") for token in tokens(text)]
    return Counter(str(target) for target in found if target)


def spans(text: str) -> Counter[str]:
    """Names in code within the text: commands, options, files."""
    return Counter(token.content for token in tokens(text) if token.type == "code_inline")


def numbers(text: str) -> Counter[str]:
    """Digits in the text, code left out."""
    words = [token.content for token in tokens(text) if token.type == "text"]
    return Counter(number for part in words for number in NUMBER.findall(part))


CHECKS = {
    "skeleton": skeleton,
    "code": code,
    "targets": targets,
    "spans": spans,
    "numbers": numbers,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("page", TWINS)
def test_a_twin_keeps_step(repository: Path, page: str, check: str) -> None:
    original = (repository / page).read_text("utf-8")
    twin = (repository / TWINS[page]).read_text("utf-8")
    here, there = CHECKS[check](original), CHECKS[check](twin)
    if isinstance(here, Counter):
        assert not here - there, f"{TWINS[page]} lacks these {check}"
        assert not there - here, f"{TWINS[page]} has these {check}, which {page} has not"
    assert here == there, f"{TWINS[page]} is out of step with {page}: {check}"


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("skeleton", "\n## One more\n"),
        ("code", "\n```bash\nlibortho inspect DIR\n```\n"),
        ("targets", "\n[one](more.md)\n"),
        ("spans", "\n`--one-more`\n"),
        ("numbers", "\nIt took 3.75 s.\n"),
    ],
)
def test_a_change_of_one_side_is_seen(repository: Path, check: str, change: str) -> None:
    text = (repository / "README.md").read_text("utf-8")
    assert CHECKS[check](text) != CHECKS[check](text + change)


def test_every_twin_is_kept_in_step(repository: Path) -> None:
    pages = [*repository.glob("*.zh.md"), *(repository / "docs").rglob("*.zh.md")]
    assert {p.relative_to(repository).as_posix() for p in pages} == set(TWINS.values())
