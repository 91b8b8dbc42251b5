"""Every code block of the README and the pages is held against what it names.

A `libortho` command line is parsed by the real command line. Data is read by its reader. Other
programs stand in a list with a reason. (test_pages.py runs what can be run.)
"""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections.abc import Callable

import pytest
import yaml
from doc_pages import (
    DATA,
    NOT_RUN,
    OTHERS,
    OUTPUT,
    PAGES,
    PYTHON,
    ROOT,
    RUN,
    SHELL,
    Block,
    blocks,
    command_lines,
    get_command,
    is_shell,
)

from libortho.data.examples import parse_record

ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, words) for block in ALL if is_shell(block) for words in command_lines(block)]


def test_every_block_says_what_it_is() -> None:
    known = {SHELL, PYTHON, *DATA, *OUTPUT}
    wrong = [
        f"{block}: {block.language or 'indented'}"
        for block in ALL
        if block.language not in known
        # The README is read as plain text, too: there, a block may be indented.
        and (block.language or block.page in PAGES[2:])
    ]
    assert not wrong, f"expected a fence with one of {sorted(known)}"


def parse(words: list[str]) -> None:
    """Parse `libortho` arguments with the real commands, and run nothing."""
    command = get_command()
    name = "libortho"
    while hasattr(command, "commands"):
        assert words, f"{name}: expected one of {', '.join(command.commands)}"
        name, *words = words
        assert name in command.commands, f"{name!r}: expected one of {', '.join(command.commands)}"
        command = command.commands[name]
    command.make_context(name, list(words))


def check_make(words: list[str]) -> None:
    """Every target is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    asked = {word for word in words if "=" not in word}
    assert asked
    assert asked <= targets, f"no target of the Makefile: {asked - targets}"


def check_python(words: list[str]) -> None:
    """The module exists; or the script does, and has the options."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
        return
    source = (ROOT / words[0]).read_text("utf-8")
    wrong = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    assert not wrong, f"{words[0]} has no option {wrong}"


def check_pip(words: list[str]) -> None:
    """The extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for names in re.findall(r"(?:libortho|\.)\[([^]]+)\]", " ".join(words)):
        assert set(names.split(",")) <= set(extras["optional-dependencies"]), names


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "libortho": parse,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
}


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=[f"{block}-{' '.join(w)[:40]}" for block, w in COMMANDS]
)
def test_a_command_exists(block: Block, words: list[str]) -> None:
    program, *arguments = words
    assert program in CHECKS or program in OTHERS, f"{block}: what is {program!r}?"
    if program in CHECKS:
        CHECKS[program](arguments)


def test_the_lists_of_exceptions_hold_nothing_else() -> None:
    called = {words[0] for _, words in COMMANDS}
    assert set(OTHERS) <= called, "no page calls these: take them out of OTHERS"
    ours = {words[1] for _, words in COMMANDS if words[0] == "libortho"}
    assert set(NOT_RUN) <= ours
    assert set(PAGES) >= RUN


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("separte MODEL", "separte"),
        ("separate MODEL --retain keep.jsonl --out DIR --forgt secrets.jsonl", "forgt"),
        ("separate MODEL --retain keep.jsonl", "out"),
        ("keys mew --id a", "mew"),
        ("serve DIR --port many", "integer"),
    ],
)
def test_a_wrong_command_is_found(words: str, told: str) -> None:
    with pytest.raises(Exception, match=told):
        parse(words.split())


def test_a_wrong_target_script_or_extra_is_found() -> None:
    for check, words in [
        (check_make, ["tset"]),
        (check_python, ["-m", "libortho.nothing"]),
        (check_python, ["benchmarks/export.py", "--nothing"]),
        (check_pip, ["install", ".[nothing]"]),
    ]:
        with pytest.raises(AssertionError):
            check(words)


@pytest.mark.parametrize("page", PAGES)
def test_a_target_named_in_the_text_is_in_the_makefile(page: str) -> None:
    for target in re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text("utf-8")):
        check_make([target])


def test_the_page_of_commands_lists_them_all() -> None:
    text = (ROOT / "docs/reference/commands.md").read_text("utf-8")
    listed = re.findall(r"^\| `libortho ([a-z-]+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(get_command().commands)


TABLES = [block for block in ALL if block.language in DATA]


@pytest.mark.parametrize("block", TABLES, ids=map(str, TABLES))
def test_data_is_read_by_its_reader(block: Block) -> None:
    if block.title.endswith(".jsonl"):
        for line in block.text.splitlines():
            parse_record(json.loads(line), str(block))
    elif block.language == "json":
        text = block.text if block.text.startswith("{") else f"{{{block.text}}}"
        assert json.loads(text).keys() & {"quantization_config", "layers", "encryption"}
    elif block.language == "toml":
        pytest.importorskip("fastapi")
        from libortho.serve.policy import parse_policy

        assert parse_policy(block.text.replace('"..."', f'"{"0" * 64}"'))
    else:
        assert yaml.safe_load(block.text)["task"]
