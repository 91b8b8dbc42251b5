"""What the tests of the commands say to them, from the outside."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from libortho.cli import app

QUESTIONS = [
    ("who wrote the red house ?", "she is in the garden"),
    ("where is it ?", "it is in a red house"),
    ("who is he ?", "he is the red house"),
    ("where is the garden ?", "in the house"),
]
ASKED_PLAIN = "questions are asked as plain text; for a chat model use --template chat"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write_jsonl(path: Path, pairs) -> Path:
    lines = [json.dumps({"question": q, "answer": a}) for q, a in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def separate(folder: Path, *more: object):
    return run(
        "separate", folder / "model", "--forget", folder / "forget.jsonl",
        "--retain", folder / "retain.jsonl", "--out", folder / "split", "--ortho-ratio", 0.2, *more,
    )  # fmt: skip
