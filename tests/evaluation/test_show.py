"""What the terminal shows of results: the words of models and people, as they are."""

from __future__ import annotations

import io

from rich.console import Console

from libortho.evaluation.show import print_summary


def shown(**changes) -> str:
    summary = {
        "task": {"source": "TOFU [of mine]"},
        "rows": {"alpha 0": {}},
        "bars": [],
        "separation": {"warnings": ["text retain[a] is long"]},
        "examples": [],
        **changes,
    }
    written = io.StringIO()
    print_summary(summary, Console(file=written, width=120))
    return " ".join(written.getvalue().split())


def test_brackets_in_answers_and_warnings_are_no_markup() -> None:
    example = {"question": "Who [is] it?", "truth": "He.", "alpha 0": "It is [/bold] she."}
    words = shown(examples=[example])
    for text in ("TOFU [of mine]", "retain[a]", "Who [is] it?", "It is [/bold] she."):
        assert text in words


def test_the_example_is_one_that_the_full_model_recites() -> None:
    wrong = {"question": "Who was it?", "truth": "He was it.", "full": "She was it."}
    right = {"question": "Where is it?", "truth": "It is here.", "full": " It is here."}
    assert "Where is it?" in shown(examples=[wrong, right])
    assert "Who was it?" in shown(examples=[wrong, wrong | {"question": "Who?"}])
