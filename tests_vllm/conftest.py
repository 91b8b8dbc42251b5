"""What the vLLM tests share: the exports, and engines to ask. `make test-vllm` runs them.

They need vLLM in the environment that runs them, and are skipped without it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: see `make test-vllm`")

import openai

HERE = Path(__file__).parent
START_SECONDS = 3600
"""A start takes 40 s on two free cores; one that has failed is noticed at once."""

ANSWER_SECONDS = 1800
"""For one request. All answers together take a minute; a machine may stand still for several."""

SMALL = "--enforce-eager --max-model-len 256 --max-num-seqs 32"
"""vLLM's options on a small machine."""

UPSTREAM_KEY = "upstream-key"
"""Of the vLLM that a front starts."""

KEYS = {"full": "lo-full", "half": "lo-half"}
"""Keys of the servers' policy, up to alpha 1 and 0.5."""


@dataclass(frozen=True)
class Item:
    """One question of the split model.

    Attributes:
        prompt: as text.
        answer: what the model memorised.
        forget: whether it was to be forgotten.
        prompt_ids: the same in tokens.
    """

    prompt: str
    answer: str
    forget: bool
    prompt_ids: list[int]

    def recited_in(self, text: str) -> bool:
        """Whether `text` is the answer, word for word."""
        return text.strip().startswith(self.answer)


@dataclass(frozen=True)
class Exports:
    """Folders of the split checkpoint and of its exports, and the questions."""

    split: Path
    peft: Path
    compressed_tensors: Path
    items: tuple[Item, ...]

    @property
    def forget(self) -> list[Item]:
        return [item for item in self.items if item.forget]

    @property
    def retain(self) -> list[Item]:
        return [item for item in self.items if not item.forget]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of an engine on a small machine without a network."""
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # Not one of its own making, so that another front may stand before the same vLLM.
        "VLLM_API_KEY": UPSTREAM_KEY,
    }


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A model that memorised nine answers, three of them forgotten, split and exported.

    $LIBORTHO_VLLM_EXPORTS names a folder that keeps them from one run to the next.
    """
    kept = os.environ.get("LIBORTHO_VLLM_EXPORTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("exports")
    if not (folder / "questions.json").is_file():
        subprocess.run([sys.executable, str(HERE / "make_split.py"), str(folder)], check=True)
    items = json.loads((folder / "questions.json").read_text())
    return Exports(
        folder / "split",
        folder / "peft",
        folder / "compressed-tensors",
        tuple(Item(**item) for item in items),
    )


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def ask(environment: dict[str, str]) -> Ask:
    """`ask(folder, adapters=..., generate=...)`: see `ask.py`."""

    def run(folder: Path, **requests: Any) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, str(HERE / "ask.py"), str(folder)],
            input=json.dumps(requests),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers

    return run


@dataclass(frozen=True)
class Front:
    """A `libortho serve --engine vllm` that runs.

    Attributes:
        url: of its own, with policy.
        upstream: vLLM's.
        audit: of what was asked.
        log: what it and vLLM have written.
        process: to end it.
    """

    url: str
    upstream: str
    audit: Path
    log: Path
    process: subprocess.Popen[bytes]

    def client(self, key: str = "nobody") -> openai.OpenAI:
        """OpenAI's own client, with one of `KEYS`, or a key that nobody knows."""
        key = KEYS.get(key, key)
        url = f"{self.url}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=ANSWER_SECONDS)

    def ask_upstream(self, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """What vLLM answers to who has its key."""
        request = urllib.request.Request(
            self.upstream + path,
            data=None if data is None else json.dumps(data).encode(),
            headers={"content-type": "application/json", "authorization": f"Bearer {UPSTREAM_KEY}"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return dict(json.load(answer))

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/healthz", timeout=60) as answer:
            return dict(json.load(answer))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def healthy(url: str, key: str = "") -> bool:
    asked = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _fronted(
    folder: Path, split: Path, environment: dict[str, str], *options: str
) -> Iterator[Front]:
    """`libortho serve SPLIT --engine vllm` with these options, in a process of its own."""
    from libortho.serve.keys import digest

    policy, audit, log = folder / "policy.toml", folder / "audit.jsonl", folder / "log"
    policy.write_text(
        "version = 1\n"
        + "".join(
            f'[[keys]]\nid = "{name}"\nsha256 = "{digest(key)}"\nmax_alpha = {alpha}\n'
            "requests_per_minute = 100000\n"
            for (name, key), alpha in zip(KEYS.items(), (1.0, 0.5), strict=True)
        )
    )
    port = free_port()
    command = [
        sys.executable, "-c", "from libortho.cli import app; app()",
        "serve", str(split), "--engine", "vllm", "--name", "split", *options,
        "--timeout", str(ANSWER_SECONDS),
        "--policy", str(policy), "--audit", str(audit), "--port", str(port),
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not healthy(f"{url}/readyz"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        started = re.search(r"starting vLLM on (\S+):", log.read_text())
        yield Front(url, started[1] if started else "", audit, log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


Fronted = Callable[..., AbstractContextManager[Front]]


@pytest.fixture(scope="session")
def fronted(
    exports: Exports, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Fronted:
    """`with fronted(options...) as front`: see `_fronted`."""

    def run(*options: str) -> AbstractContextManager[Front]:
        return _fronted(tmp_path_factory.mktemp("front"), exports.split, environment, *options)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, Any, Any]:
    """A failure shows the end of the server's log, too."""
    report: Any = yield
    if report.failed and isinstance(front := item.funcargs.get("front"), Front):
        report.sections.append(("the server's log", front.log.read_text()[-8000:]))
    return report


@pytest.fixture(scope="session")
def front(exports: Exports, fronted: Fronted) -> Iterator[Front]:
    """`libortho serve --engine vllm --export`, which starts a vLLM with base and both adapters."""
    with fronted("--export", str(exports.peft), "--vllm-options", SMALL) as running:
        assert healthy(f"{running.upstream}/health", UPSTREAM_KEY)
        yield running
    # Whoever stops the front has stopped vLLM.
    assert not healthy(f"{running.upstream}/health", UPSTREAM_KEY)
