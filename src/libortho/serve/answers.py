"""From the pieces of several answers to OpenAI's responses and streams."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from libortho.serve.engine import Answer, Finish, Piece, TokenLogprob
from libortho.serve.errors import ApiError

log = logging.getLogger(__name__)

Kind = Literal["chat", "text"]


@dataclass
class Gathered:
    """One answer as far as it has come."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish
        self.prompt_tokens = piece.prompt_tokens
        self.completion_tokens = piece.completion_tokens


@dataclass(frozen=True)
class Envelope:
    """What all parts of one response share.

    Attributes:
        id: of the response.
        created: seconds since 1970.
        n: answers to each prompt; they follow one another.
        logprobs: whether they were asked for.
    """

    id: str
    kind: Kind
    model: str
    alpha: float
    created: int
    n: int
    logprobs: bool

    def head(self, object_name: str) -> dict[str, Any]:
        """The fields around the choices."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "alpha": self.alpha,
        }

    def usage(self, gathered: Sequence[Gathered]) -> dict[str, int]:
        """Tokens; a prompt that several answers share counts once."""
        prompt = sum(answer.prompt_tokens for answer in gathered[:: self.n])
        made = sum(answer.completion_tokens for answer in gathered)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }

    def response(self, gathered: Sequence[Gathered]) -> dict[str, Any]:
        """The whole response, not streamed."""
        chat = self.kind == "chat"
        choices: list[dict[str, Any]] = []
        for index, answer in enumerate(gathered):
            content: dict[str, Any] = {"text": answer.text}
            if chat:
                message = {"role": "assistant", "content": answer.text, "refusal": None}
                content = {"message": message}
            logprobs = self._logprobs(answer.tokens, 0) if self.logprobs else None
            choices.append(
                {
                    "index": index,
                    **content,
                    "logprobs": logprobs,
                    "finish_reason": answer.finish,
                }
            )
        name = "chat.completion" if chat else "text_completion"
        return {**self.head(name), "choices": choices, "usage": self.usage(gathered)}

    def chunk(self, index: int, piece: Piece, offset: int, first: bool) -> dict[str, Any]:
        """A chunk of a stream: a piece of one answer.

        Args:
            offset: characters of that answer's tokens before this piece.
            first: whether it is that answer's first piece.
        """
        chat = self.kind == "chat"
        logprobs = self._logprobs(piece.tokens, offset) if self.logprobs else None
        content: dict[str, Any] = {"text": piece.text}
        if chat:
            delta: dict[str, Any] = {"content": piece.text} if piece.text or first else {}
            content = {"delta": {"role": "assistant", **delta} if first else delta}
        name = "chat.completion.chunk" if chat else "text_completion"
        choice = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": piece.finish,
        }
        return {**self.head(name), "choices": [choice]}

    def usage_chunk(self, gathered: Sequence[Gathered]) -> dict[str, Any]:
        """The last chunk of a stream that asked for it."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self.head(name), "choices": [], "usage": self.usage(gathered)}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        if self.kind == "chat":
            content = [
                {
                    **_chat_token(token.text, token.logprob),
                    "top_logprobs": [_chat_token(text, value) for text, value in token.top],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": offsets,
        }


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


async def merged(
    answers: Sequence[Answer], deadline: float
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers, as they come, with the answer's index.

    All answers are closed when this ends, however it ends.

    Args:
        deadline: in the event loop's time.

    Raises:
        ApiError: the first error of any answer (500 for one that is none of ours), or 504 at the
            deadline.
    """
    queue: asyncio.Queue[tuple[int, Piece | ApiError]] = asyncio.Queue()

    async def drain(index: int, answer: Answer) -> None:
        try:
            async for piece in answer:
                queue.put_nowait((index, piece))
        except ApiError as error:
            queue.put_nowait((index, error))
        except Exception as error:
            # Where it was, and not its message: that may hold the text that was asked.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("an answer failed: %s at\n%s", type(error).__name__, where)
            queue.put_nowait((index, ApiError(500, "server_error", "an unexpected error")))

    tasks = [asyncio.create_task(drain(i, answer)) for i, answer in enumerate(answers)]
    left = len(answers)
    try:
        while left:
            try:
                async with asyncio.timeout_at(deadline):
                    index, item = await queue.get()
            except TimeoutError:
                raise ApiError(504, "timeout", "the answer took too long") from None
            if isinstance(item, ApiError):
                raise item
            left -= item.finish is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            with suppress(Exception):
                await answer.aclose()


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
