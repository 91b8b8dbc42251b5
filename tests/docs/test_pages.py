"""Pages are followed: Python runs, page by page, in one namespace.

On the pages that a newcomer follows, `libortho` commands run, too, on tiny models.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doc_pages import (
    NOT_RUN,
    PAGES,
    PYTHON,
    RUN,
    SERVED,
    Block,
    blocks,
    command_lines,
    get_command,
    is_shell,
)
from typer.testing import CliRunner

from libortho.cli import app


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

    def remember(*arguments: Any, **more: Any) -> run.Server:
        made.append(make(*arguments, **more))
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
    from transformers import AutoTokenizer

    from libortho.checkpoint import load_split
    from libortho.evaluation.text import evaluate_text, read_text

    follow("docs/tutorial.md")
    split = Path("split")
    model, tokenizer = load_split(split), AutoTokenizer.from_pretrained(split)

    def probability(text: str) -> dict[str, float]:
        items = read_text(Path(text), tokenizer, "chat")
        found = evaluate_text(model, items, [0.0, 1.0], lambda *_: None)
        return dict(found["probability"])

    forget, keep, unseen = (probability(f"{n}.jsonl") for n in ("forget", "keep", "unseen"))
    assert forget["1.0"] > 0.8
    # A model of two narrow layers keeps all customers in the same place: others go along with the
    # three, and how far the kept ones stay says nothing of a model of real size.
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
