"""What the server's tests share: a split with a canary, and servers in threads."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai

from libortho.serve.app import create_app
from libortho.serve.audit import AuditLog
from libortho.serve.engine_transformers import TransformersEngine
from libortho.serve.gate import Gate
from libortho.serve.keys import digest
from libortho.serve.limits import Limits
from libortho.serve.loading import Loaded, load_for_serving
from libortho.serve.policy import Policy, parse_policy
from libortho.serve.run import serving

KEYS = {"full": "lo-full", "half": "lo-half", "slow": "lo-slow"}


@pytest.fixture(scope="session")
def crosstalk() -> ModuleType:
    """benchmarks/crosstalk.py, whose model and load are the tests' too."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "crosstalk.py"
    spec = importlib.util.spec_from_file_location("crosstalk", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crosstalk"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def canary(crosstalk: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split that recites at alpha 1 and not at alpha 0; read only."""
    folder = tmp_path_factory.mktemp("canary") / "split"
    crosstalk.make_split(folder)
    return folder


@pytest.fixture(scope="session")
def known(crosstalk: ModuleType, canary: Path) -> dict[tuple[str, float], str]:
    """What the canary model says alone: text by (prompt, alpha)."""
    return dict(crosstalk.reference(canary).answers)


@pytest.fixture(scope="session")
def loaded(canary: Path) -> Loaded:
    """The canary split, loaded once; servers never change it."""
    return load_for_serving(canary)


POLICY = f"""
version = 1
without_key_requests_per_minute = 100000
[[keys]]
id = "full"
sha256 = "{digest(KEYS["full"])}"
max_alpha = 1.0
requests_per_minute = 100000
[[keys]]
id = "half"
sha256 = "{digest(KEYS["half"])}"
max_alpha = 0.5
requests_per_minute = 100000
[[keys]]
id = "slow"
sha256 = "{digest(KEYS["slow"])}"
max_alpha = 1.0
requests_per_minute = 2
"""


class Running:
    """A server that runs, and clients for it."""

    def __init__(self, url: str, gate: Gate, audit: Path) -> None:
        self.url, self.gate, self.audit = url, gate, audit

    def client(self, key: str = "nobody") -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEYS.get(key, key), max_retries=0)


Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def serve(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """`with serve(policy=..., limits=..., engine=...) as running`."""

    @contextmanager
    def run(
        policy: str | Policy = POLICY,
        limits: Limits | None = None,
        engine: Any = None,
        page: Path | None = None,
        policy_path: Path | None = None,
        name: str = "canary",
        hosts: list[str] | None = None,
    ) -> Iterator[Running]:
        limits = limits or Limits(rows=8)
        engine = engine or TransformersEngine(loaded, limits)
        followed = parse_policy(policy) if isinstance(policy, str) else policy
        audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
        gate = Gate(engine, name, followed, limits, AuditLog(audit), policy_path)
        with serving(create_app(gate, page, hosts), gate) as url:
            yield Running(url, gate, audit)

    return run


@pytest.fixture(scope="session")
def running(serve: Serve) -> Iterator[Running]:
    """One server with the usual policy, for all tests that do not change it."""
    with serve() as server:
        yield server


# -- what tests do with them -------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _complete(client: openai.OpenAI, prompt: str, alpha: float | None = None, **more: Any) -> Any:
    extra = {} if alpha is None else {"extra_body": {"alpha": alpha}}
    given = {"model": "canary", "temperature": 0, "max_tokens": 24, **more}
    return client.completions.create(prompt=prompt, **given, **extra)


def _wait_until(true: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="session")
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """`lines(path)`: the objects of a file of JSON lines."""
    return _lines


@pytest.fixture(scope="session")
def complete() -> Callable[..., Any]:
    """`complete(client, prompt, alpha, **more)`: a greedy completion of at most 24 tokens."""
    return _complete


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """`wait_until(true, seconds)`: until `true()` is, or fail."""
    return _wait_until
