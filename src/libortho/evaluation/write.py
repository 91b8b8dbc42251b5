"""A job's results in files: summary.json and report.html, beside its splits."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

from libortho.evaluation.rows import COLUMNS
from libortho.files import write_json


def run_folder(out: Path | None) -> Path:
    """The folder for a job's results: `out`, or runs/<local time>."""
    return out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Write a job's summary and the page that is drawn from it."""
    write_json(folder / "summary.json", summary)
    (folder / "report.html").write_text(render_report(summary), encoding="utf-8")


def render_report(summary: dict[str, Any]) -> str:
    """The self-contained HTML page of a summary; everything in it is escaped but our own SVG."""
    from jinja2 import Environment

    from libortho.evaluation import plots

    source = resources.files("libortho.evaluation").joinpath("report.html.j2").read_text("utf-8")
    rows = summary["rows"]
    swept = sorted((n for n in rows if n.startswith("alpha ")), key=lambda n: float(n.split()[1]))
    shown = summary["examples"][0] if summary["examples"] else {}
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
            speakers=[key for key in shown if key not in ("question", "truth")],
            sweep=plots.alpha_sweep(rows),
            plane=plots.forgetting_against_utility(rows),
            columns=[c for c in COLUMNS if any(c.measure in row for row in rows.values())],
            truth=plots.truth_ratio_curves(rows),
            layers=plots.ortho_per_layer(summary["separation"]["layers"]),
            settings=json.dumps(settings, indent=1, ensure_ascii=False),
        )
    )
