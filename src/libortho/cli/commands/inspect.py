"""`libortho inspect`: what a split checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from libortho.alpha import ortho_layers
from libortho.checkpoint import load_split
from libortho.cli.console import say, write_json
from libortho.errors import OrthoLocked
from libortho.separate import separation_report


def run_inspect(folder: Path, json_file: Path | None) -> None:
    """Print a split's layers, sizes and errors, and whether its ortho stream is there."""
    try:
        model = load_split(folder)
    except OrthoLocked:
        model = load_split(folder, base_only=True)
    report = separation_report(model)
    layers = ortho_layers(model).values()
    present = all(layer.ortho is not None for layer in layers)
    say(str(report))
    if present:
        say("ortho stream: present")
    elif any(layer.locked for layer in layers):
        say("ortho stream: locked (encrypted, and there is no key; alpha 0)")
    else:
        say("ortho stream: absent (base-only, alpha 0)")
    write_json(json_file, {"ortho_present": present, **report.to_dict()})
