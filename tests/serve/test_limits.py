"""Rates, and the bounds on bodies and slow clients, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("prometheus_client")

from libortho.serve.limits import BoundedRequests, Limits, RateLimiter, address_bucket


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_holds_a_minute_and_refills_evenly() -> None:
    clock = Clock()
    rates = RateLimiter(clock)
    assert [rates.take("a", 3) for _ in range(3)] == [0, 0, 0]
    assert rates.take("a", 3) == pytest.approx(20)
    assert rates.take("b", 3) == 0, "another bucket"
    clock.now = 19
    assert rates.take("a", 3) == pytest.approx(1)
    clock.now = 20.1
    assert rates.take("a", 3) == 0
    assert rates.take("a", 3) > 0


def test_a_cost_above_the_bucket_waits_for_a_full_one_and_owes_the_rest() -> None:
    clock = Clock()
    rates = RateLimiter(clock)
    assert rates.take("a", 6, cost=12) == 0
    assert rates.take("a", 6) == pytest.approx(70)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=60))
def test_never_more_than_the_rate(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    rates = RateLimiter(clock)
    granted = 0
    for wait, cost in steps:
        clock.now += wait
        if rates.take("a", 30, cost) == 0:
            granted += cost
    assert granted <= 30 + clock.now * 30 / 60 + 1e-6


def test_buckets_are_bounded() -> None:
    rates = RateLimiter(Clock(), buckets=3)
    for name in "abcd":
        rates.take(name, 1)
    assert rates.take("d", 1) > 0
    assert rates.take("a", 1) == 0, "the oldest was dropped"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "a name", False),
    ],
)
def test_an_ipv6_address_takes_from_its_networks_bucket(one: str, other: str, same: bool) -> None:
    assert (address_bucket(one) == address_bucket(other)) is same


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_limits_are_whole_and_positive(value: Any) -> None:
    with pytest.raises(ValueError, match=f"rows={value!r}: expected a whole number"):
        Limits(rows=value)


def ask(parts: list[Any], limits: Limits, headers: Any = (), slow: float = 0) -> tuple[Any, bytes]:
    """What comes back of a request in parts: (status, or what the app saw, body)."""
    sent: list[Any] = []
    seen: list[bytes] = []

    async def receive() -> Any:
        part = parts.pop(0)
        if isinstance(part, float):
            await asyncio.sleep(part)
            part = parts.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        await asyncio.sleep(slow)
        sent.append(message)

    async def app(_: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    scope = {"type": "http", "headers": list(headers)}
    asyncio.run(BoundedRequests(app, limits)(scope, receive, send))
    if seen:
        return (sent[0]["status"] if sent else None), seen[0]
    return (sent[0]["status"] if sent else None), b"".join(m.get("body", b"") for m in sent)


SMALL = Limits(body_bytes=10, body_seconds=1, send_seconds=1)


def test_a_body_comes_whole() -> None:
    assert ask([b"01234", b"56789"], SMALL) == (200, b"0123456789")


@pytest.mark.parametrize(
    ("parts", "headers", "status", "code"),
    [
        ([b"0123456789", b"x"], (), 413, "body_too_large"),
        ([b""], [(b"content-length", b"11")], 413, "body_too_large"),
        ([b"0", 3.0, b"1"], (), 408, "body_too_slow"),
    ],
)
def test_a_body_is_bounded(parts: Any, headers: Any, status: int, code: str) -> None:
    got, body = ask(parts, SMALL, headers)
    assert got == status
    assert json.loads(body)["error"]["code"] == code


def test_a_client_that_left_or_takes_nothing_is_dropped() -> None:
    assert ask([b"01", None], SMALL) == (None, b"")
    assert ask([b"01"], SMALL, slow=3) == (None, b"01")
