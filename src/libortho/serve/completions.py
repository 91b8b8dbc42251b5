"""The routes that make answers: chat, completions and scores, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from libortho.serve import shapes
from libortho.serve.answers import DONE, Envelope, Gathered, Kind, event, merged, now
from libortho.serve.engine import Answer, Generation, Message, Prompt, Scoring
from libortho.serve.errors import ApiError, bad_request
from libortho.serve.gate import Gate, Grant
from libortho.serve.openapi import error_responses

CLIENT_GONE = 499
"""Status in the audit log of an answer whose client left before it was whole."""


def add_completions(app: FastAPI, gate: Gate) -> None:
    """Add the routes to an application."""
    errors = error_responses(400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
    streamed: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The answer, or with `stream` its chunks as server-sent events.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }

    @app.post(
        "/v1/chat/completions",
        response_model=shapes.ChatCompletion,
        responses={**errors, **streamed},
    )
    async def chat(request: Request, body: shapes.ChatRequest) -> Response:
        """Answer a conversation."""
        wanted = None if not (body.logprobs or body.top_logprobs) else body.top_logprobs or 0
        most = body.max_completion_tokens or body.max_tokens
        messages = tuple(Message(m.role, m.text()) for m in body.messages)
        works = _works(gate, body, [Prompt(messages=messages)], most, wanted)
        return await _answer(request, gate, "chat", body, works, _texts(messages))

    @app.post("/v1/completions", response_model=shapes.Completion, responses={**errors, **streamed})
    async def complete(request: Request, body: shapes.CompletionRequest) -> Response:
        """Continue a text, or several."""
        works = _works(gate, body, _prompts(body.prompt), body.max_tokens, body.logprobs)
        return await _answer(request, gate, "text", body, works, body.prompt)

    @app.post("/v1/score", response_model=shapes.Score, responses=errors)
    async def score(request: Request, body: shapes.ScoreRequest) -> Any:
        """How likely a given completion is, token by token, at each of several alphas."""
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("expected either prompt or messages", "prompt")
        if len(body.alphas) > gate.limits.choices:
            raise bad_request(f"expected at most {gate.limits.choices} alphas", "alphas")
        messages = None
        if body.messages is not None:
            messages = tuple(Message(m.role, m.text()) for m in body.messages)
        prompt = Prompt(text=body.prompt, messages=messages)
        work = Scoring(prompt, body.completion, tuple(body.alphas))
        texts = {
            "prompt": body.prompt if messages is None else _texts(messages),
            "completion": body.completion,
        }
        grant = gate.admit(request, "/v1/score", body.model, work.alphas, len(work.alphas), texts)

        async def run() -> dict[str, Any]:
            scores = await gate.engine.score(work)
            grant.prompt_tokens = scores.prompt_tokens
            return {
                "object": "score",
                "model": body.model,
                "tokens": list(scores.tokens),
                "data": [
                    {"alpha": alpha, "logprobs": list(values)}
                    for alpha, values in zip(work.alphas, scores.logprobs, strict=True)
                ],
                "prompt_tokens": scores.prompt_tokens,
            }

        return await _finishing(request, gate, grant, run())


def _works(
    gate: Gate,
    body: shapes.ChatRequest | shapes.CompletionRequest,
    prompts: list[Prompt],
    max_tokens: int | None,
    logprobs: int | None,
) -> list[Generation]:
    """`n` generations for each prompt, within the limits."""
    n = body.n or 1
    limits = gate.limits
    if len(prompts) * n > limits.choices:
        raise bad_request(
            f"{len(prompts) * n} answers in one request: expected at most {limits.choices}", "n"
        )
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise bad_request(
            f"max_tokens={max_tokens}: expected at most {limits.max_tokens}", "max_tokens"
        )
    return [
        Generation(
            prompt,
            body.alpha,
            max_tokens,
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            # The answers to one prompt differ, and a seed repeats all of them.
            None if body.seed is None else (body.seed + index) % 2**63,
            body.stops(),
            logprobs,
        )
        for prompt in prompts
        for index in range(n)
    ]


def _texts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    """A conversation, for the audit log."""
    return [{"role": m.role, "content": m.content} for m in messages]


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [Prompt(text=prompt)]
    if isinstance(prompt[0], int):
        return [Prompt(ids=tuple(prompt))]
    return [Prompt(text=p) if isinstance(p, str) else Prompt(ids=tuple(p)) for p in prompt]


async def _answer(
    request: Request,
    gate: Gate,
    kind: Kind,
    body: shapes.ChatRequest | shapes.CompletionRequest,
    works: list[Generation],
    prompt: Any,
) -> Response:
    route = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    texts = {"prompt": prompt}
    grant = gate.admit(request, route, body.model, (body.alpha,), len(works), texts)
    try:
        answers = await gate.engine.submit(works)
    except ApiError as error:
        gate.finished(grant, error.status, error.code)
        raise
    except BaseException:
        gate.finished(grant, 500, "server_error")
        raise
    prefix = "chatcmpl-" if kind == "chat" else "cmpl-"
    wants_logprobs = works[0].logprobs is not None
    envelope = Envelope(
        prefix + grant.id, kind, body.model, body.alpha, now(), body.n or 1, wants_logprobs
    )
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)

        async def close() -> None:
            # A generator that was never begun runs no `finally` of its own.
            for answer in answers:
                await answer.aclose()
            gate.finished(grant, CLIENT_GONE, "client_gone")

        return _Stream(_chunks(gate, grant, answers, envelope, usage), close)

    async def run() -> dict[str, Any]:
        gathered = [Gathered() for _ in answers]
        pieces = merged(answers, grant.deadline)
        try:
            async for index, piece in pieces:
                gathered[index].add(piece)
                _note(gate, grant, gathered, envelope)
        finally:
            await pieces.aclose()
        return envelope.response(gathered)

    try:
        return JSONResponse(await _finishing(request, gate, grant, run()))
    finally:
        # A task that was cancelled before its first step has closed nothing.
        for answer in answers:
            await answer.aclose()


def _note(gate: Gate, grant: Grant, gathered: list[Gathered], envelope: Envelope) -> None:
    """Keep the grant's account of what was made up to date."""
    if not grant.first_token:
        grant.first_token = True
        gate.metrics.first.observe(_elapsed(gate, grant))
    usage = envelope.usage(gathered)
    grant.prompt_tokens = usage["prompt_tokens"]
    grant.completion_tokens = usage["completion_tokens"]
    grant.finish = [answer.finish for answer in gathered]
    if grant.keep_text:
        grant.answers = [answer.text for answer in gathered]


def _elapsed(gate: Gate, grant: Grant) -> float:
    return asyncio.get_running_loop().time() - (grant.deadline - gate.limits.request_seconds)


async def _finishing(
    request: Request, gate: Gate, grant: Grant, work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """Run `work` while the client is there and time is left; write down how it ended."""
    status, code = 500, "server_error"
    try:
        result = await _while_connected(request, work, grant.deadline)
        status, code = 200, ""
        return result
    except ApiError as error:
        status, code = error.status, error.code
        raise
    finally:
        gate.finished(grant, status, code or None)


async def _while_connected(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]], deadline: float
) -> dict[str, Any]:
    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing = asyncio.create_task(work)
    watching = asyncio.create_task(disconnected())
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ApiError(CLIENT_GONE, "client_gone", "the client left")
        return await doing
    except TimeoutError:
        raise ApiError(504, "timeout", "the answer took too long") from None
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


class _Stream(StreamingResponse):
    """Server-sent events; however they end, also before the first, `close` is awaited."""

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(
            chunks, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._chunks.aclose()
            await self._close()


async def _chunks(
    gate: Gate, grant: Grant, answers: list[Answer], envelope: Envelope, usage: bool
) -> AsyncGenerator[bytes, None]:
    gathered = [Gathered() for _ in answers]
    begun = [False] * len(answers)
    status, code = CLIENT_GONE, "client_gone"
    pieces = merged(answers, grant.deadline)
    try:
        async for index, piece in pieces:
            # As in a whole answer: text may be held back while its tokens are told.
            offset = sum(len(token.text) for token in gathered[index].tokens)
            gathered[index].add(piece)
            _note(gate, grant, gathered, envelope)
            yield event(envelope.chunk(index, piece, offset, not begun[index]))
            begun[index] = True
        if usage:
            yield event(envelope.usage_chunk(gathered))
        status, code = 200, ""
        yield DONE
    except ApiError as error:
        # The status line is long gone: the error comes as OpenAI's streams bring it, as an event.
        status, code = error.status, error.code
        yield event(error.body())
    finally:
        await pieces.aclose()
        gate.finished(grant, status, code or None)
