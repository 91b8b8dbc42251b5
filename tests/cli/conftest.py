"""What the tests of the commands work on."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import QUESTIONS, write_jsonl


@pytest.fixture
def folder(tmp_path: Path, tiny_llama, tokenizer) -> Path:
    """A model folder, and beside it forget.jsonl and retain.jsonl."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", QUESTIONS[:2])
    write_jsonl(tmp_path / "retain.jsonl", QUESTIONS[2:])
    return tmp_path
