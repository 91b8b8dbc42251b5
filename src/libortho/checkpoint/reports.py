"""`report.json`: how the split was made and what was measured of it, for people and for the card.

Loading needs nothing of it but the layers' own reports, which `separation_report` shows again;
asking needs the form in which questions were asked.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from libortho.checkpoint.names import REPORT
from libortho.checkpoint.schema import blame, decode, read_object
from libortho.data.tokens import Template
from libortho.files import json_text
from libortho.report import LayerReport, SeparationReport

_DERIVED = "density"
"""What `SeparationReport.to_dict` adds to a layer's own fields."""


def report_text(report: SeparationReport) -> str:
    """The text of `report.json`; numbers that JSON lacks (NaN, Inf) become null."""
    return json_text(report.to_dict())


def read_reports(folder: Path, layers: Container[str]) -> dict[str, LayerReport]:
    """The layers' reports by name, empty where the folder has no `report.json`.

    Raises:
        CheckpointError: it is malformed, or speaks of a layer that is not among `layers`.
    """
    path = folder / REPORT
    if not path.is_file():
        return {}
    with blame(path):
        plain = read_object(path).get("layers")
        if not isinstance(plain, list):
            raise ValueError(f"layers={plain!r}: expected an array")
        found = {}
        for position, entry in enumerate(plain):
            if isinstance(entry, dict):
                entry = {key: value for key, value in entry.items() if key != _DERIVED}
            report: LayerReport = decode(LayerReport, entry, f"layers[{position}]")
            if report.name not in layers:
                raise ValueError(f"layers[{position}].name={report.name!r}: no such layer is split")
            found[report.name] = report
    return found


def read_template(folder: Path) -> Template | None:
    """How questions became prompts when the split was made and measured.

    None where the folder does not say: it has no `report.json`, or no question was asked, or its
    split is from before reports said so.

    Raises:
        CheckpointError: the report is malformed, or names a form that there is not.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    with blame(path):
        settings = read_object(path).get("settings", {})
        if not isinstance(settings, dict):
            raise ValueError(f"settings={settings!r}: expected an object")
        found: Template | None = decode(
            Template | None, settings.get("template"), "settings.template"
        )
    return found
