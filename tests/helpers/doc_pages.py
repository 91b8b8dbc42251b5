"""The pages, their code blocks, and what of them runs: for the tests in tests/docs."""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from typer.main import get_command as make_command

from libortho.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if not path.name.endswith(".zh.md")  # test_translation.py: the blocks are the same
    ),
]
SHELL, PYTHON, DATA, OUTPUT = "bash", "python", ("json", "toml", "yaml"), ("text", "console")

RUN = {"README.md", "docs/quickstart.md", "docs/howto.md", "docs/tutorial.md"}
"""Pages whose `libortho` commands run."""

NOT_RUN = {
    "tofu": "minutes; `make demo` is this job",
    "attack": "minutes; tests/attacks has it on a tiny model",
    "ui": "serves until it is stopped; tests/serve/test_ui.py has it in a browser",
    "encrypt": "locks the split for the lines after it; tests/cli/test_vault.py has it",
}
"""Commands that no page runs."""

SERVED = {"docs/tutorial.md"}
"""Pages on which `libortho serve` runs, as its client follows; on others it would run for ever."""

OTHERS = {
    ".": "the shell's own",
    "cd": "the shell's own",
    "export": "the shell's own",
    "curl": "asks a vLLM server: tests_vllm/test_server.py does",
    "git": "clones from the network",
    "llama-server": "not among the test's packages; tests/export/test_llama_cpp.py has the library",
    "touch": "the shell's own",
    "pip": "installs from the network; extras are checked",
    "vllm": "2 GB in a venv of its own: `make test-vllm`",
}
"""Programs of others that pages call, and why the tests do not."""


@dataclass(frozen=True)
class Block:
    """A code block: where it begins, its language ("" if indented), its text, its title."""

    page: str
    line: int
    language: str
    text: str
    title: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@functools.cache
def blocks(page: str) -> tuple[Block, ...]:
    """All code blocks of a page, in order."""
    found = []
    for token in MarkdownIt().parse((ROOT / page).read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            language, _, rest = token.info.strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(page, line, language, token.content, title[1] if title else ""))
    return tuple(found)


def is_shell(block: Block) -> bool:
    """Whether a block is for the shell: it says so, or is indented and begins with a program."""
    if block.language:
        return block.language == SHELL
    words = shlex.split(block.text.splitlines()[0].replace("'", ""), comments=True)
    return bool(words) and words[0] in {"libortho", "make", "python", *OTHERS}


def command_lines(block: Block) -> list[list[str]]:
    """The words of each command, comments left out, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in lines if words]


@functools.cache
def get_command() -> Any:
    """The whole command line, which takes a moment to make."""
    return make_command(app)
