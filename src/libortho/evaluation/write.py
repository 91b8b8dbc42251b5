"""A run's folder: summary.json, report.html and the split checkpoint."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

from libortho.checkpoint import save_split
from libortho.evaluation.tofu import TofuOutcome


def run_folder(out: Path | None) -> Path:
    """The folder for a run's results, made: `out`, or runs/<local time>.

    Raises:
        FileExistsError: `out` holds files already.
    """
    folder = out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_run(outcome: TofuOutcome, folder: Path) -> None:
    """Write the split first: it is what cannot be drawn again from a summary."""
    save_split(outcome.model, folder / "split", tokenizer=outcome.tokenizer, report=outcome.report)
    text = json.dumps(outcome.summary, indent=1, ensure_ascii=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_report(outcome.summary), encoding="utf-8")


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
                k: summary[k]
                for k in ("task", "rows", "checks", "examples", "separation", "seconds")
            },
            model_name=Path(summary["model"]).name,
            base=rows[swept[0]],
            whole=rows[swept[-1]],
            speakers=[key for key in shown if key not in ("question", "truth")],
            sweep=plots.alpha_sweep(rows),
            truth=plots.truth_ratio_curves(rows),
            layers=plots.ortho_per_layer(summary["separation"]["layers"]),
            settings=json.dumps(settings, indent=1, ensure_ascii=False),
        )
    )
