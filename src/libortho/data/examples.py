"""Examples in words, and the readers that make them from a user's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from libortho.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One thing that a model may have memorised.

    Attributes:
        answer: what is (to be) recited; for plain text, the whole text.
        question: what it is asked with; None for plain text.
        paraphrased_question, paraphrased_answer: the same in other words, or None.
        perturbed_answers: wrong answers in the shape of the paraphrased one; may be empty.
    """

    answer: str
    question: str | None = None
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()


def _text(record: Mapping[str, object], key: str, where: str, *, required: bool) -> str | None:
    value = record.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} is {value!r}, expected a non-empty string")
    return _encodable(value, key, where)


def _encodable(text: str, key: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{where}: {key!r} holds {half!r}, half of a character (a lone surrogate)"
        ) from None
    return text


def parse_record(record: object, where: str) -> Example:
    """An `Example` from one JSON object: {"text"} or {"question", "answer"}, TOFU's keys optional.

    Raises:
        DataError: anything else; `where` (file and line) opens the message.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if "text" in record and "answer" not in record:
        return Example(answer=_text(record, "text", where, required=True) or "")
    if "question" not in record or "answer" not in record:
        keys = ", ".join(map(str, record)) or "none"
        raise DataError(
            f"{where}: expected 'text', or 'question' and 'answer'; the keys are: {keys}"
        )
    perturbed = record.get("perturbed_answer")
    if perturbed is None:
        perturbed = []
    elif isinstance(perturbed, str):
        perturbed = [perturbed]
    if not isinstance(perturbed, list) or not all(isinstance(p, str) for p in perturbed):
        raise DataError(f"{where}: 'perturbed_answer' is not a list of strings")
    return Example(
        question=_text(record, "question", where, required=True),
        answer=_text(record, "answer", where, required=True) or "",
        paraphrased_question=_text(record, "paraphrased_question", where, required=False),
        paraphrased_answer=_text(record, "paraphrased_answer", where, required=False),
        perturbed_answers=tuple(_encodable(p, "perturbed_answer", where) for p in perturbed),
    )


def check_file(path: Path) -> Path:
    """The path, if there is something to read: a file or a pipe.

    Raises:
        FileNotFoundError: there is nothing, or a folder; it is named.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: expected a file")
    return path


def read_words(path: Path) -> str:
    """A text file in UTF-8, without the byte order mark that some editors put before it.

    Raises:
        FileNotFoundError: as `check_file`.
        DataError: it is not UTF-8; the file is named.
    """
    try:
        return check_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8: {error}") from None


def read_jsonl(path: str | Path) -> list[Example]:
    """Read a JSON Lines file, one {"text"} or {"question", "answer"} object a line.

    Blank lines are passed over, and so is a byte order mark; anything else that is not such an
    object is an error.

    Raises:
        FileNotFoundError: as `check_file`.
        DataError: a line that is not as above (file and line are named), or no example at all.
    """
    path = check_file(Path(path))
    examples: list[Example] = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig").strip()
                record = json.loads(line) if line else None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON in UTF-8: {error}") from None
            if line:
                examples.append(parse_record(record, where))
    if not examples:
        raise DataError(f"{path}: holds no example")
    return examples
