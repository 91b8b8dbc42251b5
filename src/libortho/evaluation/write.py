"""A job's results in files: summary.json, report.html and its pictures, beside its splits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libortho.evaluation.rows import COLUMNS
from libortho.files import replacing, write_json, write_text

if TYPE_CHECKING:
    from libortho.evaluation.canvas import Picture

SPEAKERS = {
    "truth": "the truth",
    "alpha 1": "alpha 1",
    "alpha 0": "alpha 0",
    "reference": "a model that never saw it",
}
"""Whose answers stand side by side in the report; the others' are folded away."""


@contextmanager
def run_folder(out: Path | None) -> Iterator[Path]:
    """The folder for a job's results: `out`, or runs/<local time>, which is made and is new.

    One that was made here does not stay where the block fails before anything is in it.
    """
    if out is not None:
        yield out
        return
    folder = _new_run_folder()
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # not empty
            folder.rmdir()
        raise


def _new_run_folder() -> Path:
    started = time.strftime("%Y-%m-%d-%H%M%S")
    for number in count(1):
        folder = Path("runs") / (started if number == 1 else f"{started}-{number}")
        try:
            folder.mkdir(parents=True)  # only one of the runs that begin in this second can
            break
        except FileExistsError:
            continue
    return folder


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Write a job's summary, the page that is drawn from it, and the page's plots as PNG files."""
    from libortho.evaluation.plots import pictures

    drawn = pictures(summary)
    write_json(folder / "summary.json", summary)
    write_text(folder / "report.html", render_report(summary, drawn))
    for picture in drawn:
        with replacing(folder / f"{picture.name}.png") as partial:
            partial.write_bytes(picture.png())


def render_report(summary: dict[str, Any], drawn: Sequence[Picture]) -> str:
    """The self-contained HTML page of a summary; everything in it is escaped but our own SVG."""
    from jinja2 import Environment

    source = resources.files("libortho.evaluation").joinpath("report.html.j2").read_text("utf-8")
    rows = summary["rows"]
    swept = sorted((n for n in rows if n.startswith("alpha ")), key=lambda n: float(n.split()[1]))
    shown = summary["examples"][0] if summary["examples"] else {}
    others = [key for key in shown if key not in ("question", *SPEAKERS)]
    settings = {key: summary[key] for key in ("recipe", "versions") if key in summary} | summary[
        "separation"
    ]["settings"]
    return (
        Environment(autoescape=True)
        .from_string(source)
        .render(
            **{
                k: summary[k] for k in ("task", "rows", "bars", "examples", "separation", "seconds")
            },
            model_name=Path(summary["model"]).name,
            base=rows[swept[0]],
            whole=rows[swept[-1]],
            speakers={key: SPEAKERS[key] for key in SPEAKERS if key in shown},
            others=others,
            seeds=list(summary.get("seeds", {})),
            pictures=drawn,
            columns=[c for c in COLUMNS if any(c.measure in row for row in rows.values())],
            settings=json.dumps(settings, indent=1, ensure_ascii=False),
        )
    )
