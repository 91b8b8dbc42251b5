"""`libortho inspect`: what a split checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from libortho.alpha import ortho_layers
from libortho.checkpoint import load_split
from libortho.cli.console import console, write_json
from libortho.separate import separation_report


def run_inspect(folder: Path, json_file: Path | None) -> None:
    """Print a split's layers, sizes and errors, and whether its ortho stream is there."""
    model = load_split(folder)
    report = separation_report(model)
    present = all(layer.ortho is not None for layer in ortho_layers(model).values())
    console.print(str(report), highlight=False, soft_wrap=True)
    console.print(
        "ortho stream: present" if present else "ortho stream: absent (base-only, alpha 0)"
    )
    write_json(json_file, {"ortho_present": present, **report.to_dict()})
