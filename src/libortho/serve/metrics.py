"""Prometheus metrics of one server (its own registry: several servers may share a process)."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from libortho.serve.engine import Status
from libortho.serve.limits import AsgiApp, Message, Receive, Send

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Metrics:
    """Counters of a server; `text` is what /metrics says."""

    def __init__(self, status: Callable[[], Status], audit_failures: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "libortho_requests",
            "Requests by route and HTTP status.",
            ("route", "status"),
            registry=self.registry,
        )
        self.refused = Counter(
            "libortho_refused", "Refused requests by code.", ("code",), registry=self.registry
        )
        self.tokens = Counter(
            "libortho_tokens",
            "Tokens by kind (prompt, completion) and stream (base: alpha 0; ortho: above it).",
            ("kind", "stream"),
            registry=self.registry,
        )
        self.alpha = Histogram(
            "libortho_alpha_granted",
            "Alphas granted.",
            buckets=ALPHAS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "libortho_request_seconds",
            "From the request to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "libortho_first_token_seconds",
            "From the request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.reloads = Counter(
            "libortho_policy_reloads",
            "Reloads of the policy by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self._gauge("libortho_waiting", "Answers in the queue.", lambda: status().waiting)
        self._gauge("libortho_running", "Answers being made.", lambda: status().running)
        self._gauge(
            "libortho_ortho_present",
            "1 where alphas above 0 can be served.",
            lambda: status().max_alpha > 0,
        )
        self._gauge(
            "libortho_audit_failures", "Audit lines that could not be written.", audit_failures
        )

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware: counts requests by route and status, and times them, streams included."""

    def __init__(self, app: AsgiApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        status = "none"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # The template, not the path: a path is the client's, and would make labels at will.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - begun)
