"""vLLM as the engine: its own server holds the exported base, and the ortho stream as adapters.

alpha 0 is the base itself; any other alpha is an adapter whose factors were exported at that scale.
So only the alphas that have an adapter can be had, and an adapter that vLLM does not list as loaded
on this base is not served. Requests say which cache they may share (`cache_salt`): a prefix that
was computed at one alpha is never read at another, whatever vLLM does with adapters in its keys.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx2

from libortho.checkpoint import read_manifest
from libortho.data.tokens import Template
from libortho.serve.engine import (
    Answer,
    EngineUnavailable,
    Finish,
    Generation,
    Piece,
    Scores,
    Scoring,
    Status,
    TokenLogprob,
)
from libortho.serve.errors import ApiError, alpha_not_served, bad_request
from libortho.serve.limits import Limits

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""How often the upstream server is asked which adapters it has."""

PATIENCE_SECONDS = 60.0
"""How long it may take to say so, or to take a connection: one that is busy, or whose machine stood
still, is not gone, and one that is gone refuses at once."""

API_KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the upstream server's own key, if it wants one; vLLM reads it, too."""


def parse_adapters(options: Sequence[str]) -> dict[float, str]:
    """`["1=ortho", "0.5=half"]` -> {1.0: "ortho", 0.5: "half"}.

    Raises:
        ValueError: not ALPHA=NAME, an alpha outside (0, 1], or an alpha or a name given twice.
    """
    adapters: dict[float, str] = {}
    for option in options:
        number, _, name = option.partition("=")
        try:
            alpha = float(number)
        except ValueError:
            alpha = math.nan
        if not (name and 0.0 < alpha <= 1.0):
            raise ValueError(f"--adapter {option!r}: expected ALPHA=NAME with 0 < ALPHA <= 1")
        if alpha in adapters or name in adapters.values():
            raise ValueError(f"--adapter {option!r}: this alpha or name is given twice")
        adapters[alpha] = name
    return adapters


class VllmEngine:
    """`Engine` in front of a vLLM server.

    Only this process should be able to reach that server: it knows no policy.
    """

    def __init__(
        self,
        folder: Path,
        upstream: str,
        base: str,
        adapters: Mapping[float, str],
        limits: Limits,
        key: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            folder: the split checkpoint that was exported; its digest names the model in the audit
                log.
            upstream: URL of vLLM's server, without `/v1`.
            base: the name under which it serves the base.
            adapters: alpha -> name of the adapter.
            key: the server's own, if it wants one.
            transport: how it is reached; by default the network, and no proxy.
        """
        self.digest = read_manifest(folder).base_sha256
        self.template: Template = "chat"
        self._upstream, self._base, self._limits = upstream.rstrip("/"), base, limits
        self._adapters = dict(adapters)
        if base in self._adapters.values():
            raise ValueError(f"adapter {base!r} has the name of the base")
        self._key, self._transport = key, transport
        self._client: httpx2.AsyncClient | None = None
        self._looking: asyncio.Task[None] | None = None
        self._ready = False
        self._levels: tuple[float, ...] = (0.0,)
        self._open = 0

    async def start(self) -> None:
        """Look at the upstream server, and go on looking.

        Raises:
            EngineUnavailable: it does not answer, or does not serve the base.
        """
        connections = httpx2.Limits(max_connections=self._limits.queue + self._limits.rows)
        self._client = httpx2.AsyncClient(
            base_url=self._upstream,
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(self._limits.request_seconds, connect=PATIENCE_SECONDS),
            # One that is given goes by no proxy of the environment, which would read every prompt.
            transport=self._transport or httpx2.AsyncHTTPTransport(limits=connections),
        )
        await self._look()
        if not self._ready:
            await self._client.aclose()
            raise EngineUnavailable(
                f"{self._upstream} does not answer, or does not serve {self._base!r}; the log says "
                "which"
            )
        self._looking = asyncio.create_task(self._keep_looking())

    async def stop(self) -> None:
        """Close the connections."""
        self._ready = False
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        if self._client is not None:
            await self._client.aclose()

    def status(self) -> Status:
        """How it is, as of the last look."""
        ortho: Literal["present", "missing", "unusable"] = "missing"
        if self._adapters:
            ortho = "present" if len(self._levels) == len(self._adapters) + 1 else "unusable"
        return Status(self._ready, ortho, max(self._levels), self._levels, 0, self._open)

    async def submit(self, works: Sequence[Generation]) -> list[Answer]:
        """Send all of these on; see `Engine`."""
        status = self.status()
        if not status.ready:
            raise ApiError(503, "not_ready", "the engine cannot be reached", retry_after=5)
        if self._open + len(works) > self._limits.queue + self._limits.rows:
            raise ApiError(429, "queue_full", "too much is waiting; try again", retry_after=1)
        for work in works:
            if not status.serves(work.alpha):
                raise alpha_not_served(work.alpha, status.served())
        opened: list[Answer] = []
        try:
            for work in works:
                opened.append(await self._send(work))
        except BaseException:
            for answer in opened:
                await answer.aclose()
            raise
        return opened

    async def score(self, work: Scoring) -> Scores:
        """Not possible here: vLLM tells no log-probabilities of a prompt through every route."""
        raise bad_request("this engine does not score given texts", code="not_supported")

    async def _send(self, work: Generation) -> Answer:
        assert self._client is not None
        path, body = self._request(work)
        self._open += 1
        try:
            request = self._client.build_request("POST", path, json=body)
            response = await self._client.send(request, stream=True)
            if response.status_code != 200:
                try:
                    raise await _refused(response)
                finally:
                    await response.aclose()
        except BaseException as error:
            self._open -= 1
            if isinstance(error, httpx2.HTTPError):
                raise _unreachable(error) from None
            raise
        return _Upstream(self, response, work)

    def _request(self, work: Generation) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self._base if work.alpha == 0 else self._adapters[work.alpha],
            "max_tokens": work.max_tokens or self._limits.default_tokens,
            "temperature": work.temperature,
            "top_p": work.top_p,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "cache_salt": f"alpha-{work.alpha!r}",
        }
        if work.seed is not None:
            body["seed"] = work.seed
        if work.stop:
            body["stop"] = list(work.stop)
        if work.prompt.messages is not None:
            turns = [{"role": m.role, "content": m.content} for m in work.prompt.messages]
            body["messages"] = turns
            if work.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": work.logprobs}
            return "/v1/chat/completions", body
        body["prompt"] = work.prompt.text if work.prompt.ids is None else list(work.prompt.ids)
        if work.logprobs is not None:
            body["logprobs"] = work.logprobs
        return "/v1/completions", body

    def closed(self) -> None:
        """One answer fewer is open."""
        self._open -= 1

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Which of the configured adapters are loaded, on the base that is served."""
        assert self._client is not None
        try:
            response = await self._client.get("/v1/models", timeout=PATIENCE_SECONDS)
            response.raise_for_status()
            parents = {card["id"]: card.get("parent") for card in response.json()["data"]}
        # Whatever it was: if the looking ended here, what was seen last would stand for ever.
        except Exception as error:
            if self._ready or self._looking is None:
                log.error("%s: %s", self._upstream, str(error) or type(error).__name__)
            self._ready, self._levels = False, (0.0,)
            return
        if self._base not in parents:
            log.error("%s does not serve %r", self._upstream, self._base)
            self._ready, self._levels = False, (0.0,)
            return
        levels = [0.0]
        for alpha, name in sorted(self._adapters.items()):
            # An adapter of that name on another base would be somebody else's.
            if parents.get(name) == self._base:
                levels.append(alpha)
            elif alpha in self._levels or self._looking is None:
                log.error("adapter %r is not loaded on %r: no alpha %g", name, self._base, alpha)
        self._ready, self._levels = True, tuple(levels)


class _Upstream:
    """An answer as it comes from upstream."""

    def __init__(self, engine: VllmEngine, response: httpx2.Response, work: Generation) -> None:
        self._engine, self._response, self._work = engine, response, work
        self._pieces = self._read()
        self._closed = False

    def __aiter__(self) -> _Upstream:
        return self

    async def __anext__(self) -> Piece:
        try:
            return await anext(self._pieces)
        except httpx2.HTTPError as error:
            raise _unreachable(error) from None
        except (ValueError, KeyError, TypeError) as error:
            log.error("an answer of the engine cannot be read: %s", type(error).__name__)
            raise ApiError(502, "engine_failed", "the engine's answer cannot be read") from None

    async def aclose(self) -> None:
        # Closing the connection is how vLLM learns that nobody waits any more.
        if not self._closed:
            self._closed = True
            self._engine.closed()
            await self._response.aclose()

    async def _read(self) -> AsyncGenerator[Piece, None]:
        prompt_tokens = made = 0
        finish: Finish | None = None
        async for line in self._response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                raise ApiError(502, "engine_failed", "the engine failed on this request")
            usage = chunk.get("usage") or {}
            prompt_tokens = usage.get("prompt_tokens", prompt_tokens)
            made = usage.get("completion_tokens", made)
            text, tokens = "", tuple[TokenLogprob, ...]()
            for choice in chunk["choices"]:
                text += (
                    (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
                )
                tokens += _tokens(choice.get("logprobs"))
                reason = choice.get("finish_reason")
                if reason is not None:
                    finish = "length" if reason == "length" else "stop"
            if text or tokens:
                yield Piece(text, tokens, None, prompt_tokens, made)
        if finish is None:
            raise ApiError(502, "engine_failed", "the engine's answer broke off")
        # The counts come after the last text, so the end is told last of all.
        yield Piece("", (), finish, prompt_tokens, made)


def _tokens(logprobs: dict[str, Any] | None) -> tuple[TokenLogprob, ...]:
    if not logprobs:
        return ()
    if "content" in logprobs:
        return tuple(
            TokenLogprob(
                token["token"],
                token["logprob"],
                tuple((t["token"], t["logprob"]) for t in token.get("top_logprobs") or ()),
            )
            for token in logprobs["content"] or ()
        )
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
    return tuple(
        TokenLogprob(token, value, tuple((top or {}).items()))
        for token, value, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True
        )
    )


async def _refused(response: httpx2.Response) -> ApiError:
    """What to say of an error of vLLM: a request that it does not take is the caller's."""
    status = response.status_code
    if status not in (400, 413, 422):
        log.error("the engine answered %d", status)
        return ApiError(502, "engine_failed", f"the engine answered {status}")
    message = ""
    with suppress(ValueError, AttributeError):
        answer = json.loads(await response.aread())
        message = str((answer.get("error") or answer).get("message") or "")
    return bad_request(f"the engine does not take this request: {message[:300]}")


def _unreachable(error: httpx2.HTTPError) -> ApiError:
    log.error("the engine cannot be reached: %s", str(error) or type(error).__name__)
    if isinstance(error, httpx2.TimeoutException):
        return ApiError(504, "timeout", "the engine took too long")
    return ApiError(502, "engine_failed", "the engine cannot be reached")
