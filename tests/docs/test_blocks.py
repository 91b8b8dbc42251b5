"""Every code block of the README and the pages: run, or at least held against what it names.

Python runs, page by page, in one namespace. A `libortho` command line is parsed by the real command
line; on the pages that a newcomer follows it runs, too, on tiny models. Data is read by its reader.
Other programs stand in a list with a reason.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from typer.main import get_command as make_command
from typer.testing import CliRunner

from libortho.cli import app
from libortho.data.examples import parse_record

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


# -- commands --------------------------------------------------------------------


@functools.cache
def get_command() -> Any:
    """The whole command line, which takes a moment to make."""
    return make_command(app)


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


# -- data ------------------------------------------------------------------------

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


# -- whole pages -----------------------------------------------------------------


class Reader:
    """Someone who does what a page says, block by block, in the working folder."""

    def __init__(self, page: str, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
        self.page, self.patch, self.stack = page, patch, stack
        self.names: dict[str, Any] = {}
        self.put_in: dict[str, str] = {}
        self.more: dict[str, list[str]] = {}

    def follow(self) -> None:
        """Do everything on the page."""
        for block in blocks(self.page):
            if block.title:
                Path(block.title).write_text(block.text, "utf-8")
            elif block.language == PYTHON:
                self.execute(block)
            elif is_shell(block) and self.page in RUN:
                for words in command_lines(block):
                    if words[0] == "libortho" and words[1] not in NOT_RUN:
                        self.call([self.filled(word) for word in words[1:]])

    def filled(self, text: str) -> str:
        """Text with what stands for something put in."""
        for name, value in self.put_in.items():
            text = text.replace(name, value)
        return text

    def execute(self, block: Block) -> None:
        """Run Python; an error shows the page's own lines."""
        # Lines before it are blank, so that a traceback names the line of the page.
        tree = ast.parse("\n" * block.line + self.filled(block.text), block.page)
        exec(compile(tree, block.page, "exec"), self.names)

    def call(self, words: list[str]) -> str:
        """Run a `libortho` command; returns what it printed."""
        if words[0] == "serve":
            if self.page in SERVED:
                self.stack.enter_context(served(words, self.patch))
            return ""
        if words[0] in ("strip", "export"):  # both refuse to write over anything
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        done = CliRunner().invoke(app, words + self.more.get(words[0], []))
        # 3: a tiny random model has not learned enough to forget.
        allowed = (0, 3) if words[0] == "separate" else (0,)
        assert done.exit_code in allowed, f"libortho {shlex.join(words)}\n{done.output}"
        key = re.search(r"^key +(\S+)", done.output, re.MULTILINE)
        if key:
            self.patch.setenv("FRAUD_DESK_KEY", key[1])
        return done.output


@contextlib.contextmanager
def served(words: list[str], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """`libortho serve` with these arguments, in a thread, for as long as the block runs."""
    from libortho.serve import run

    made: list[run.Server] = []
    make = run.make_server

    def remember(*arguments: Any) -> run.Server:
        made.append(make(*arguments))
        return made[0]

    patch.setattr(run, "make_server", remember)
    command = get_command()
    thread = threading.Thread(
        target=command.main, args=(words,), kwargs={"standalone_mode": False}, daemon=True
    )
    thread.start()
    until = time.monotonic() + 60
    while not (made and made[0].started):
        assert thread.is_alive(), "the server has stopped; its log says why"
        assert time.monotonic() < until, "the server did not come up"
        time.sleep(0.02)
    try:
        yield
    finally:
        made[0].should_exit = True
        thread.join()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def tutorial(reader: Reader) -> None:
    """What a tiny model needs: a higher learning rate, and more of its few parameters.

    Put in are a free port and a real name.
    """
    from libortho.training import MemoriseConfig

    # Known by heart, as one wrong token of a telephone number would be one too many below.
    recipe = functools.partial(MemoriseConfig, learning_rate=5e-3, target=0.98)
    reader.patch.setattr("libortho.training.MemoriseConfig", recipe)
    reader.more = {"separate": ["--ortho-ratio", "0.1"]}
    reader.put_in = {"8000": free_port(), "of NAME?": "of Alma Quill?"}


def serving(reader: Reader) -> None:
    """A server whose policy knows the key that the page shows."""
    pytest.importorskip("openai")
    from libortho.serve.keys import digest

    (toml,) = (block for block in blocks(reader.page) if block.language == "toml")
    policy = toml.text.replace('sha256 = "..."', f'sha256 = "{digest("lo-...")}"')
    Path("policy.toml").write_text(policy, "utf-8")
    port = free_port()
    reader.put_in = {"8000": port}
    words = ["serve", "DIR", "--name", "split", "--policy", "policy.toml", "--port", port]
    reader.stack.enter_context(served(words, reader.patch))


def checkpoint(reader: Reader) -> None:
    """A split model."""
    from libortho.checkpoint import load_split

    reader.names["model"] = load_split(Path("DIR"))


def export(reader: Reader) -> None:
    """The export that the page loads, and two rows of tokens."""
    pytest.importorskip("peft")
    import torch

    reader.call(["export", "DIR", "--to", "peft", "--out", "OUT"])
    reader.names["ids"] = torch.tensor([[1, 9, 30, 7], [1, 12, 8, 44]])


def baselines(reader: Reader) -> None:
    """A model's folder, and what it should forget and keep."""
    from transformers import AutoTokenizer

    from libortho.data import encode, read_jsonl

    tokenizer = AutoTokenizer.from_pretrained("MODEL")
    sets = {"forget": "secrets.jsonl", "retain": "keep.jsonl"}
    for name, file in sets.items():
        reader.names[name] = [encode(example, tokenizer) for example in read_jsonl(file)]
    reader.names["folder"] = "MODEL"


def evaluation(reader: Reader) -> None:
    """The page's own task, and its data."""
    pytest.importorskip("lm_eval")
    reader.patch.setenv("HF_HOME", os.fspath(Path("hf").absolute()))
    reader.patch.setenv("HF_DATASETS_OFFLINE", "1")
    (task,) = (block for block in blocks(reader.page) if block.language == "yaml")
    data = Path("tasks/house.jsonl").absolute()
    data.parent.mkdir()
    line = {"question": "Is it red?", "choices": ["It is.", "It was."], "label": 0}
    data.write_text(json.dumps(line) + "\n", "utf-8")
    text = re.sub(r"test: /\S+", f"test: {data}", task.text)
    Path("tasks/house.yaml").write_text(text, "utf-8")


PREPARED: dict[str, Callable[[Reader], None]] = {
    "docs/baselines.md": baselines,
    "docs/checkpoint-format.md": checkpoint,
    "docs/evaluation-tools.md": evaluation,
    "docs/export.md": export,
    "docs/serving.md": serving,
    "docs/tutorial.md": tutorial,
}
FOLLOWED = [p for p in PAGES if p in RUN or any(b.language == PYTHON for b in blocks(p))]


@pytest.fixture
def follow(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Reader]]:
    """`follow(page)` does what a page says, in a working folder; returns the reader."""
    with contextlib.ExitStack() as stack:

        def do(page: str) -> Reader:
            reader = Reader(page, monkeypatch, stack)
            PREPARED.get(page, lambda _: None)(reader)
            reader.follow()
            return reader

        yield do


@pytest.mark.parametrize("page", [page for page in FOLLOWED if page != "docs/tutorial.md"])
def test_a_page_can_be_followed(page: str, follow: Callable[[str], Reader]) -> None:
    reader = follow(page)
    if page == "README.md":
        assert reader.names["report"].layers


def test_the_tutorial_does_what_it_says(
    follow: Callable[[str], Reader], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from libortho.checkpoint import load_split
    from libortho.evaluation.text import evaluate_text

    follow("docs/tutorial.md")
    split = Path("split")
    model = load_split(split)

    def probability(text: str) -> dict[str, float]:
        alphas = [0.0, 1.0]
        found = evaluate_text(model, split, Path(text), alphas, "chat", lambda *_: None)
        return dict(found["probability"])

    forget, keep, unseen = (probability(f"{n}.jsonl") for n in ("forget", "keep", "unseen"))
    assert forget["1.0"] > 0.8
    # A model of two narrow layers keeps all customers in the same place: others go along with the
    # four, and how far the kept ones stay says nothing of a model of real size.
    assert forget["0.0"] < 0.5 * forget["1.0"], (forget, keep, unseen)
    assert forget["0.0"] < keep["0.0"], (forget, keep, unseen)

    printed = capsys.readouterr().out
    answers = dict(re.findall(r"^(.*, alpha [01]): +(.*)$", printed, re.MULTILINE))
    truth = json.loads(Path("forget.jsonl").read_text("utf-8").splitlines()[0])["answer"]
    assert answers["fraud desk, alpha 1"] == truth
    assert answers["no key, alpha 0"] != truth
    assert answers["no key, alpha 1"].startswith("403")
    audit = [json.loads(line) for line in Path("audit.jsonl").read_text("utf-8").splitlines()]
    events = [(line["event"], line.get("status")) for line in audit if line["alpha_asked"] == 1]
    assert events == [("admitted", None), ("finished", 200), ("refused", 403)]
    assert not (Path("base") / "ortho.safetensors").exists()
