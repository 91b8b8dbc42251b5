"""What stands between a request and the engine: who asks, what is granted, what is written down."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from libortho.serve.audit import AuditLog
from libortho.serve.engine import Engine
from libortho.serve.errors import (
    ApiError,
    alpha_above_limit,
    alpha_not_served,
    model_not_found,
)
from libortho.serve.limits import Limits, RateLimiter, address_bucket
from libortho.serve.metrics import Metrics
from libortho.serve.policy import ANONYMOUS, Policy, PolicyError, Principal, read_policy

log = logging.getLogger(__name__)


@dataclass
class Grant:
    """A request that may go on, and what will be said of it when it ends.

    Attributes:
        id: of the request; the response's `id` ends with it.
        alphas: granted; one but for `/v1/score`.
        deadline: in the event loop's time.
        texts, answers: what was asked, by name, and what was answered; kept only where the policy
            lets the audit log have them.
    """

    id: str
    principal: Principal
    route: str
    alphas: tuple[float, ...]
    deadline: float
    begun: float
    keep_text: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: list[str | None] = field(default_factory=list)
    texts: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    first_token: bool = False
    over: bool = False


class Gate:
    """The policy, the rate limits, the audit log and the metrics of one server."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        policy: Policy,
        limits: Limits,
        audit: AuditLog,
        policy_path: Path | None = None,
    ) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.policy, self.policy_path = policy, policy_path
        self.policy_stale = False
        self.audit = audit
        self.audit_failing = False
        self.rates = RateLimiter()
        # Apart, so that addresses, of which there may be any number, push no key's bucket out.
        self.address_rates = RateLimiter()
        self.metrics = Metrics(engine.status, lambda: audit.failures)

    def reload(self) -> None:
        """Read the policy file and open the audit log anew; on failure the old ones stay, loudly.

        Requests that were granted go on as they were granted.
        """
        try:
            policy = self.policy if self.policy_path is None else read_policy(self.policy_path)
            self.audit.reopen()
            # Last: a policy whose grants cannot be written down is not in force.
            self.policy = policy
        except (PolicyError, OSError) as error:
            self.policy_stale = True
            self.metrics.reloads.labels("failed").inc()
            log.error("the policy was not reloaded, the former one stays in force: %s", error)
        else:
            self.policy_stale = False
            self.metrics.reloads.labels("done").inc()
            log.info("the policy was reloaded: %d keys", len(self.policy.keys))

    def principal(self, request: Request) -> Principal:
        """Who asks.

        Raises:
            ApiError: 401.
        """
        presented = _bearer(request)
        principal = self.policy.principal(presented)
        if principal is None:
            what = "this API key is not known" if presented else "no API key was given"
            raise ApiError(401, "invalid_api_key", f"{what}: send `Authorization: Bearer KEY`")
        return principal

    def admit(
        self,
        request: Request,
        route: str,
        model: str,
        alphas: Sequence[float],
        cost: int,
        texts: dict[str, Any],
    ) -> Grant:
        """Let a request through, or refuse it and write that down.

        Args:
            alphas: asked for.
            cost: in requests, against the rate: one for each answer or alpha.
            texts: what is asked, by name: kept for the audit log if the policy says so.

        Raises:
            ApiError: 401, 403, 404, 429 or 503.
        """
        identity = uuid.uuid4().hex
        who = "unknown"
        try:
            principal = self.principal(request)
            who = principal.id
            self._check(request, principal, model, alphas, cost)
            grant = Grant(
                identity,
                principal,
                route,
                tuple(alphas),
                asyncio.get_running_loop().time() + self.limits.request_seconds,
                time.monotonic(),
                self.policy.audit_text,
            )
            if grant.keep_text:
                grant.texts = texts
            self._record_admission(grant)
        except ApiError as error:
            self.metrics.refused.labels(error.code).inc()
            self._write(
                "refused",
                {
                    "request": identity,
                    "key": who,
                    "route": route,
                    "alpha_asked": _plain(alphas),
                    "alpha_granted": None,
                    "model": self.name,
                    "model_digest": self.engine.digest,
                    "status": error.status,
                    "code": error.code,
                },
            )
            raise
        for alpha in alphas:
            self.metrics.alpha.observe(alpha)
        return grant

    def _check(
        self, request: Request, principal: Principal, model: str, alphas: Sequence[float], cost: int
    ) -> None:
        if model != self.name:
            raise model_not_found(model)
        highest = max(alphas)
        if highest > principal.max_alpha:
            raise alpha_above_limit(highest, principal.id, principal.max_alpha)
        if principal.requests_per_minute is not None:
            rates, name = self.rates, principal.id
            if name == ANONYMOUS:
                rates = self.address_rates
                name = address_bucket(request.client.host if request.client else "")
            wait = rates.take(name, principal.requests_per_minute, cost)
            if wait:
                raise ApiError(
                    429,
                    "rate_limit_exceeded",
                    f"more than {principal.requests_per_minute} requests a minute",
                    retry_after=int(wait) + 1,
                )
        status = self.engine.status()
        for alpha in alphas:
            if not status.serves(alpha):
                raise alpha_not_served(alpha, status.served())

    def _record_admission(self, grant: Grant) -> None:
        if not any(grant.alphas):
            return
        if not self._write("admitted", self._about(grant)):
            raise ApiError(
                503, "audit_failing", "the audit log cannot be written: only alpha 0 is served"
            )

    def finished(self, grant: Grant, status: int, code: str | None = None) -> None:
        """Write down how a granted request ended; only the first call counts."""
        if grant.over:
            return
        grant.over = True
        stream = "ortho" if any(grant.alphas) else "base"
        self.metrics.tokens.labels("prompt", stream).inc(grant.prompt_tokens)
        self.metrics.tokens.labels("completion", stream).inc(grant.completion_tokens)
        if code is not None and status != 499:
            self.metrics.refused.labels(code).inc()
        texts = {**grant.texts, "answers": grant.answers} if grant.keep_text else {}
        self._write(
            "finished",
            {
                **self._about(grant),
                "prompt_tokens": grant.prompt_tokens,
                "completion_tokens": grant.completion_tokens,
                "finish": grant.finish,
                "status": status,
                "code": code,
                "seconds": round(time.monotonic() - grant.begun, 4),
                **texts,
            },
        )

    def _about(self, grant: Grant) -> dict[str, Any]:
        return {
            "request": grant.id,
            "key": grant.principal.id,
            "route": grant.route,
            "alpha_asked": _plain(grant.alphas),
            "alpha_granted": _plain(grant.alphas),
            "model": self.name,
            "model_digest": self.engine.digest,
        }

    def _write(self, event: str, fields: dict[str, Any]) -> bool:
        written = self.audit.write(event, fields)
        self.audit_failing = not written
        return written


def _plain(alphas: Sequence[float]) -> float | list[float]:
    return alphas[0] if len(alphas) == 1 else list(alphas)


def _bearer(request: Request) -> str | None:
    """The key of the Authorization header; anything else in it is an unknown key."""
    header = request.headers.get("authorization")
    if not header:
        return None
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else header
