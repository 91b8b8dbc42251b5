"""What the terminal shows of results: the words of models and people, as they are."""

from __future__ import annotations

import io

from rich.console import Console

from libortho.evaluation.show import print_summary


def test_brackets_in_answers_and_warnings_are_no_markup() -> None:
    summary = {
        "task": {"source": "TOFU [of mine]"},
        "rows": {"alpha 0": {}},
        "bars": [],
        "separation": {"warnings": ["text retain[a] is long"]},
        "examples": [{"question": "Who [is] it?", "alpha 0": "It is [/bold] she."}],
    }
    shown = io.StringIO()
    print_summary(summary, Console(file=shown, width=120))
    words = " ".join(shown.getvalue().split())
    for text in ("TOFU [of mine]", "retain[a]", "Who [is] it?", "It is [/bold] she."):
        assert text in words
