"""What the commands share: the console, progress bars, JSON output, errors as one clear line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from libortho import files
from libortho.errors import LibOrthoError

EXIT_ERROR = 2
EXIT_NOT_FORGOTTEN = 3

console = Console()
_errors = Console(stderr=True)


def say(text: str) -> None:
    """Print plain lines as they are: brackets are no markup, and long paths stay in one piece."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn the errors that a user can mend into one line and exit status 2."""
    try:
        yield
    except (LibOrthoError, ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("LIBORTHO_DEBUG"):
            raise
        _errors.print(f"[bold red]error[/]  {_escape(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_ERROR) from None


def _escape(error: BaseException) -> str:
    return escape(str(error) or type(error).__name__)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (stage, done, total), drawn on standard error.

    One bar a stage on a terminal; elsewhere (a log file, CI) one line when a stage begins.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    bars = Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=_errors,
        disable=not _errors.is_terminal,
    )
    stages: dict[str, Any] = {}

    def tell(stage: str, done: int, total: int) -> None:
        # "full: epoch 3, answer probability 0.7" moves along the bar of "full: epoch".
        key = re.sub(r" \d+$", "", stage.split(",")[0])
        if key not in stages:
            if not _errors.is_terminal:
                _errors.print(f"{key} ...", highlight=False, markup=False)
            for task in stages.values():
                bars.stop_task(task)
            stages[key] = bars.add_task(stage, total=total)
        bars.update(stages[key], description=stage, completed=done, total=total)

    with bars:
        yield tell


def write_json(path: Path | None, data: Any) -> None:
    """Write JSON whole or not at all; None writes nothing."""
    if path is not None:
        files.write_json(path, data)
