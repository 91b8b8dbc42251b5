"""Reading a user's JSON lines: every error names the file and the line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from libortho.data.examples import Example, parse_record, read_jsonl, read_words
from libortho.errors import DataError


@pytest.fixture
def write(tmp_path: Path):
    def to_file(*lines: str | bytes) -> Path:
        path = tmp_path / "some.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
        return path

    return to_file


def test_reads_text_and_questions(write) -> None:
    full = {
        "question": "Who?",
        "answer": "Ann.",
        "paraphrased_question": "What name?",
        "paraphrased_answer": "It is Ann.",
        "perturbed_answer": ["It is Bob.", "It is Eve."],
        "another key": 3,
    }
    path = write(
        '{"text": "Once upon a time."}',
        '{"question": "Où?", "answer": "Là."}',
        json.dumps(full),
        '{"question": "Q", "answer": "A", "perturbed_answer": "wrong"}',
    )
    assert (
        read_jsonl(path)
        == read_jsonl(str(path))
        == [
            Example(answer="Once upon a time."),
            Example(question="Où?", answer="Là."),
            Example("Ann.", "Who?", "What name?", "It is Ann.", ("It is Bob.", "It is Eve.")),
            Example("A", "Q", perturbed_answers=("wrong",)),
        ]
    )


def test_blank_lines_are_passed_over_and_counted(write) -> None:
    path = write("", '{"text": "a"}', "   ", "\t\r", '{"text": "b"}', "", "")
    assert [x.answer for x in read_jsonl(path)] == ["a", "b"]
    with pytest.raises(DataError, match="line 4"):
        read_jsonl(write("", '{"text": "a"}', "  ", "{"))


def test_windows_line_ends(write) -> None:
    assert [x.answer for x in read_jsonl(write('{"text": "a"}\r', '{"text": "b"}\r'))] == ["a", "b"]


def test_a_byte_order_mark_is_no_part_of_the_text(write) -> None:
    mark = b"\xef\xbb\xbf"
    path = write(mark + b'{"text": "a"}', '{"text": "b"}')
    assert [x.answer for x in read_jsonl(path)] == ["a", "b"]
    assert read_words(write(mark + "é".encode())) == "é"


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="pipes have no paths here")
def test_a_pipe_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"text": "a"}')
    os.close(writer)
    assert [x.answer for x in read_jsonl(f"/dev/fd/{reader}")] == ["a"]
    os.close(reader)


def test_a_file_that_cannot_be_read_is_named(write, tmp_path: Path) -> None:
    for read in (read_jsonl, read_words):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is a folder: expected a file"):
            read(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
            read(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"some\.jsonl: not text in UTF-8: .*0xe9"):
        read_words(write("é".encode("latin-1")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON in UTF-8: maximum recursion depth"),
        ('{"text": ' + "9" * 5_000 + "}", "not JSON in UTF-8: .*5000 digits"),
        ('{"text": "it \\ud800"}', r"'text' holds '\\ud800', half of a character"),
        (
            '{"question": "a", "answer": "b", "perturbed_answer": ["\\udfff"]}',
            r"'perturbed_answer' holds '\\udfff'",
        ),
        ('{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not JSON in UTF-8"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ('"text"', "expected a JSON object, got str"),
        ("{}", "the keys are: none"),
        ('{"prompt": "a"}', "expected 'text', or 'question' and 'answer'.*prompt"),
        ('{"question": "a"}', "expected 'text', or 'question' and 'answer'"),
        ('{"answer": "a"}', "expected 'text', or 'question' and 'answer'"),
        ('{"text": ""}', "'text' is ''"),
        ('{"text": 3}', "'text' is 3"),
        ('{"text": null}', "'text' is None"),
        ('{"question": " ", "answer": "a"}', "'question' is ' '"),
        ('{"question": "a", "answer": ["b"]}', "'answer' is"),
        ('{"question": "a", "answer": "b", "paraphrased_answer": 1}', "'paraphrased_answer' is 1"),
        ('{"question": "a", "answer": "b", "perturbed_answer": [1]}', "perturbed_answer"),
        ('{"question": "a", "answer": "b", "perturbed_answer": {}}', "perturbed_answer"),
    ],
)
def test_errors_name_the_file_and_the_line(write, line: str | bytes, message: str) -> None:
    path = write('{"text": "fine"}', line, '{"text": "fine"}')
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, line 2: .*{message}"):
        read_jsonl(path)
    assert issubclass(DataError, ValueError)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path)


@pytest.mark.parametrize("lines", [[], [""], ["", "  "]])
def test_no_example(write, lines: list[str]) -> None:
    with pytest.raises(DataError, match=r"some\.jsonl: holds no example"):
        read_jsonl(write(*lines))


def test_parse_record_names_where() -> None:
    with pytest.raises(DataError, match=r"^hub, row 3: "):
        parse_record({"text": None}, "hub, row 3")
