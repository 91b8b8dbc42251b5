"""What asks for the key at every door of a vLLM server of our own; runs inside vLLM.

vLLM's own check covers some paths only (`/v1`); `/invocations`, for one, answers completions
without it. vLLM may live in an environment without this package, so a copy of this file alone is
put in its path (see `vllm_process`): only the standard library may be imported here.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RequireKey:
    """ASGI middleware: only who presents the key in `VLLM_API_KEY` gets past it, whatever the path.

    Raises:
        KeyError: there is no key; the server then does not start.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._wanted = b"Bearer " + os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._knows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            head = {"type": "http.response.start", "status": 401, "headers": []}
            await send(head)
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._wanted)
