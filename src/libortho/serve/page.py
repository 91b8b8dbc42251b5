"""The page of `libortho ui`: static files, and what it shows of the split.

Only aggregates leave the server. The examples and texts that a report folder may hold are what was
to be forgotten, and this page is for any alpha.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from libortho.checkpoint.names import REPORT
from libortho.checkpoint.reports import read_template
from libortho.data.tokens import prompt_text
from libortho.serve.gate import Gate

UI = Path(__file__).parent / "ui"
SUMMARY = "summary.json"
_HEADERS = {
    # No script, style or connection from anywhere else, and nobody may frame the page.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # After an upgrade the files must match the server.
    "cache-control": "no-cache",
}
_LAYER = ("name", "shape", "base_error", "final_error", "density", "kind", "rank", "ortho_bytes")
_TOTALS = ("base_error", "final_error", "density", "base_bytes", "ortho_bytes")
_ROW = (
    "forget_probability",
    "retain_probability",
    "forget_perplexity",
    "retain_perplexity",
    "truth_ratio",
)


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def add_page(app: FastAPI, gate: Gate, folder: Path) -> None:
    """Serve the page at `/ui/`, and send `/` there."""
    shown = describe_split(folder)
    # Messages are asked in the server's form: "chat" on the page must not be another one.
    shown["chat"] = shown["chat"] and gate.engine.template == "chat"

    @app.get("/ui/state", include_in_schema=False)
    async def state(request: Request) -> dict[str, Any]:
        principal = gate.principal(request)
        status = gate.engine.status()
        return {
            "model": gate.name,
            "digest": gate.engine.digest,
            "ortho": status.ortho,
            "levels": status.levels,
            "max_alpha": min(principal.max_alpha, status.max_alpha),
            "key": principal.id,
            "limits": {
                "max_tokens": gate.limits.max_tokens,
                "choices": gate.limits.choices,
            },
            **shown,
        }

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/ui/")

    app.mount("/ui", _Files(directory=UI, html=True), name="ui")


def describe_split(folder: Path) -> dict[str, Any]:
    """What the page shows of a split checkpoint: its report and its measured sweep, if there."""
    report = _read(folder / REPORT)
    return {
        # "{}" stands for the question.
        "plain": prompt_text("{}", "plain", None),  # type: ignore[arg-type]
        "chat": _has_chat_template(folder),
        "form": read_template(folder) or "plain",
        "report": None if report is None else _report(report),
        "sweep": None if report is None else _sweep(folder, report),
    }


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = _read(folder / "tokenizer_config.json")
    return bool(config and config.get("chat_template"))


def _report(report: Mapping[str, Any]) -> dict[str, Any]:
    settings = report.get("settings") or {}
    method = settings.get("method") or {}
    layers = [_only(layer, _LAYER) for layer in report.get("layers") or ()]
    return {
        "method": (report.get("layers") or [{}])[0].get("method"),
        "storage": (method.get("base") or {}).get("storage"),
        "ortho_ratio": method.get("ortho_ratio"),
        "reached": report.get("reached"),
        "forget_ppl": report.get("forget_ppl"),
        "retain_ppl": report.get("retain_ppl"),
        "forget_sequences": settings.get("forget_sequences"),
        "retain_sequences": settings.get("retain_sequences"),
        "seconds": sum((report.get("seconds") or {}).values()),
        "totals": _only(report.get("totals") or {}, _TOTALS),
        "layers": layers,
        "skipped": len(report.get("skipped") or ()),
        "warnings": list(report.get("warnings") or ()),
    }


def _sweep(folder: Path, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rows of `summary.json`, in the folder or beside it, if it is of this very split."""
    for path in (folder / SUMMARY, folder.resolve().parent / SUMMARY):
        summary = _read(path)
        separation = (summary or {}).get("separation") or {}
        if summary is not None and separation.get("layers") == report.get("layers"):
            rows = summary.get("rows") or {}
            return {
                "source": (summary.get("task") or {}).get("source"),
                "rows": {
                    name: _only(row, _ROW)
                    for name, row in rows.items()
                    if name in ("full", "reference") or name.startswith("alpha ")
                },
            }
    return None


def _only(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values.get(name) for name in names}


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none, or none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
