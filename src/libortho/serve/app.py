"""The routes: OpenAI's, with `alpha`; `/v1/score`; health and metrics; and the page, if wanted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from libortho._version import __version__
from libortho.serve import shapes
from libortho.serve.answers import now
from libortho.serve.completions import add_completions
from libortho.serve.errors import ApiError, bad_request, model_not_found
from libortho.serve.gate import Gate
from libortho.serve.limits import BoundedRequests
from libortho.serve.metrics import CountRequests
from libortho.serve.openapi import describe, error_responses


def create_app(gate: Gate, page: Path | None = None, hosts: list[str] | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        gate: with its engine, which is started and stopped with the application.
        page: the split checkpoint that `/ui/` shows; None serves no page.
        hosts: the only values of the Host header that are answered; None is any. Keeps other sites'
            pages from reaching a server of this machine under a name of their own.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gate.engine.start()
        try:
            yield
        finally:
            await gate.engine.stop()
            gate.audit.close()

    app = FastAPI(
        title="LibOrtho",
        version=__version__,
        description="OpenAI's API with one more parameter, `alpha`: how much of what the model "
        "memorised an answer may use.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app)
    add_completions(app, gate)
    _add_models(app, gate)
    _add_health(app, gate)
    if page is not None:
        from libortho.serve.page import add_page

        add_page(app, gate, page)
    # The last one added is the outermost.
    app.add_middleware(BoundedRequests, limits=gate.limits)
    if hosts is not None:
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(CountRequests, metrics=gate.metrics)
    describe(app, gate.limits)
    return app


def _add_models(app: FastAPI, gate: Gate) -> None:
    errors = error_responses(401, 404, 500)
    begun = now()

    def card(request: Request) -> dict[str, Any]:
        principal = gate.principal(request)
        return {
            "id": gate.name,
            "object": "model",
            "created": begun,
            "owned_by": "libortho",
            "max_alpha": min(principal.max_alpha, gate.engine.status().max_alpha),
        }

    @app.get("/v1/models", response_model=shapes.ModelList, responses=errors)
    async def models(request: Request) -> Any:
        """The one model that is served, and the highest alpha that the caller may have now."""
        return {"object": "list", "data": [card(request)]}

    @app.get("/v1/models/{model}", response_model=shapes.ModelCard, responses=errors)
    async def model(request: Request, model: str) -> Any:
        """The same, by name."""
        found = card(request)
        if model != gate.name:
            raise model_not_found(model)
        return found


def _add_health(app: FastAPI, gate: Gate) -> None:
    unavailable: dict[int | str, dict[str, Any]] = {
        503: {"model": shapes.Health, "description": "Takes no requests."},
        **error_responses(500),
    }

    def health() -> dict[str, Any]:
        status = gate.engine.status()
        well = status.ortho == "present" and not gate.policy_stale and not gate.audit_failing
        return {
            "status": "unavailable" if not status.ready else "ok" if well else "degraded",
            "ortho": status.ortho,
            "max_alpha": status.max_alpha,
            "policy": "stale" if gate.policy_stale else "ok",
            "audit": "failing" if gate.audit_failing else "ok",
        }

    @app.get("/healthz", response_model=shapes.Health, responses=error_responses(500))
    async def healthz() -> Any:
        """Whether the process lives, and how well: `degraded` where only alpha 0 is served."""
        return health()

    @app.get("/readyz", response_model=shapes.Health, responses=unavailable)
    async def readyz() -> Response:
        """Whether it takes requests: 200 or 503."""
        state = health()
        return JSONResponse(state, 503 if state["status"] == "unavailable" else 200)

    @app.get("/metrics", response_class=PlainTextResponse, responses=error_responses(500))
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(gate.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await api_error(request, _invalid(error))

    async def http_error(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        wrapped = ApiError(
            error.status_code, codes.get(error.status_code, "invalid_request"), str(error.detail)
        )
        response = await api_error(request, wrapped)
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> Response:
        # What it was is logged by the server; the client learns nothing of the inside.
        return await api_error(request, ApiError(500, "server_error", "an unexpected error"))

    handlers: dict[Any, Any] = {
        ApiError: api_error,
        RequestValidationError: invalid,
        HTTPException: http_error,
        Exception: unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a request, without repeating what it holds."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return bad_request("the body is not JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        name = ".".join(place)[:80]
        return bad_request(
            f"{name}: not a parameter that this server serves", name, "unknown_parameter"
        )
    name = place[0] if place else "body"
    return bad_request(f"{name}: {first['msg']}", name)
