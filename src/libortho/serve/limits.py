"""Bounds: how large, how long, how often."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from libortho.serve.errors import ApiError

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them, may take. All are at least 1 (seconds, bytes, ...).

    Attributes:
        body_bytes: of a request's body; more is a 413.
        body_seconds: in which the body must have come; longer is a 408.
        request_seconds: from the body to the end of the answer; longer is a 504.
        send_seconds: in which a client must take what is sent; slower is cut off.
        queue: answers waiting; more is a 429.
        rows: answers made at the same time, the rows of a batch.
        batch_tokens: rows times their longest length: what bounds the memory of the KV cache.
        prompt_tokens: of one prompt, also bounded by the model.
        max_tokens: the most that a request may ask for; more is a 400, never cut.
        default_tokens: what it gets where it does not ask.
        choices: answers of one request (prompts times n); also of `/v1/score`. Never more than
            `queue`: a request of more would find it too full for ever.
    """

    body_bytes: int = 1_000_000
    body_seconds: int = 15
    request_seconds: int = 300
    send_seconds: int = 30
    queue: int = 256
    rows: int = 32
    batch_tokens: int = 65_536
    prompt_tokens: int = 8_192
    max_tokens: int = 2_048
    default_tokens: int = 256
    choices: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name}={value!r}: expected a whole number of at least 1")
        object.__setattr__(self, "choices", min(self.choices, self.queue))


class RateLimiter:
    """Token buckets: a bucket holds a minute's worth of requests, and refills evenly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, buckets: int = 10_000) -> None:
        self._clock = clock
        self._most = buckets
        # name -> (tokens left, when that was); the one used longest ago goes first.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, per_minute: int, cost: int = 1) -> float:
        """Take `cost` from a bucket: 0 if that was possible, else the seconds until it would be.

        A cost above a whole bucket is taken from a full one, which then owes the rest.
        """
        now = self._clock()
        left, then = self._buckets.pop(name, (float(per_minute), now))
        left = min(float(per_minute), left + (now - then) * per_minute / 60)
        needed = min(float(cost), float(per_minute))
        wait = 0.0 if left >= needed else (needed - left) * 60 / per_minute
        self._buckets[name] = (left if wait else left - cost, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return wait


def address_bucket(host: str) -> str:
    """Which bucket an address without a key takes from: an IPv6 address that of its /64.

    Whoever has one IPv6 address has the 2^64 of its network.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), 64), strict=False))


class SlowClient(Exception):
    """A client does not take what it is sent."""


class BoundedRequests:
    """ASGI middleware: a body is read whole, within bounds, before anything else happens.

    A client that does not take what it is sent within `send_seconds` is cut off; the answer that
    it was to get is then dropped like any that nobody waits for.
    """

    def __init__(self, app: AsgiApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        bounded_send = self._bounded(send)
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await _respond(bounded_send, error)
            return
        if body is None:
            return
        first: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal first
            if first is not None:
                message, first = first, None
                return message
            return await receive()

        try:
            await self.app(scope, replay, bounded_send)
        except SlowClient:
            log.warning("a client did not take its answer in time and was cut off")

    async def _read(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """The body, or None where the client left."""
        most = self.limits.body_bytes
        too_large = ApiError(413, "body_too_large", f"the body is larger than {most} bytes")
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > most:
                raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408,
                "body_too_slow",
                f"the body did not come within {self.limits.body_seconds} seconds",
            ) from None

    def _bounded(self, send: Send) -> Send:
        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self.limits.send_seconds):
                    await send(message)
            except TimeoutError:
                raise SlowClient from None

        return bounded


async def _respond(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        # What is left of the body is not read: the connection cannot be used again.
        "connection": "close",
        **error.headers(),
    }
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
