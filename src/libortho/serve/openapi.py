"""The OpenAPI document: what FastAPI makes of the routes, with our errors and limits."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from libortho.serve import shapes
from libortho.serve.limits import Limits

_REASONS = {
    400: "The request cannot be served as it is.",
    401: "No key, or an unknown one.",
    403: "The alpha is above the key's limit.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "Too many requests, or too many waiting.",
    500: "An unexpected error.",
    503: "Not ready, or the alpha cannot be served now.",
    504: "The answer took too long.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route declares for its errors."""
    return {s: {"model": shapes.ErrorResponse, "description": _REASONS[s]} for s in statuses}


def describe(app: FastAPI, limits: Limits) -> None:
    """Make `app.openapi()` say what this server does."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _correct(document, limits)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _correct(document: dict[str, Any], limits: Limits) -> None:
    document["components"].setdefault("securitySchemes", {})["key"] = {
        "type": "http",
        "scheme": "bearer",
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            # FastAPI's own shape of a validation error, which is never sent: ours is a 400.
            operation["responses"].pop("422", None)
            if path.startswith("/v1/"):
                operation["security"] = [{}, {"key": []}]
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    most = {
        "max_tokens": limits.max_tokens,
        "max_completion_tokens": limits.max_tokens,
        "n": limits.choices,
    }
    for name in ("ChatRequest", "CompletionRequest"):
        for parameter, value in most.items():
            for option in schemas[name]["properties"].get(parameter, {}).get("anyOf", ()):
                if option.get("type") == "integer":
                    option.pop("exclusiveMaximum", None)
                    option["maximum"] = value
    schemas["ScoreRequest"]["properties"]["alphas"]["maxItems"] = limits.choices
    schemas["CompletionRequest"]["anyOf"] = _answers(limits.choices)


def _answers(most: int) -> list[dict[str, Any]]:
    """Prompts times n is at most `most`: for each number of prompts the largest n.

    An array of token ids is one prompt, as a text is.
    """
    largest = {most // n: n for n in range(1, most + 1)}
    one = [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]
    return [
        {
            "properties": {
                "n": {"anyOf": [{"type": "integer", "maximum": n}, {"type": "null"}]},
                "prompt": {"anyOf": [*one, {"type": "array", "maxItems": prompts}]},
            }
        }
        for prompts, n in largest.items()
    ]
