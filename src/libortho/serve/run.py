"""The server around the application: uvicorn, with SIGHUP as "read the policy anew"."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from libortho.serve.gate import Gate


class Server(uvicorn.Server):
    """uvicorn's server; on SIGTERM or SIGINT it takes nothing new and finishes what it has."""

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self._gate = gate

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        with _on_hangup(self._gate):
            await super().serve(sockets)


@contextmanager
def _on_hangup(gate: Gate) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGHUP, gate.reload)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError):
        # Not the main thread, or a system without the signal: there is nothing to listen to.
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def make_server(
    app: FastAPI, gate: Gate, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info"
) -> Server:
    """A server that is ready to `run()`.

    Args:
        port: 0 takes a free one.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        # A path may hold nothing secret, but who asked is the audit log's business.
        access_log=False,
        server_header=False,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=gate.limits.request_seconds,
        h11_max_incomplete_event_size=32_768,
    )
    return Server(config, gate)
