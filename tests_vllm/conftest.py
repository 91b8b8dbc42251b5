"""What the vLLM tests share: the exports, and engines to ask. `make test-vllm` runs them.

They need vLLM in the environment that runs them, and are skipped without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: see `make test-vllm`")

HERE = Path(__file__).parent


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
