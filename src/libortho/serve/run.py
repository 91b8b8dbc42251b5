"""The server around the application: uvicorn, with SIGHUP as "read the policy anew"."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from libortho.serve.engine import EngineUnavailable
from libortho.serve.gate import Gate
from libortho.serve.limits import AsgiApp, Message, Receive, Send


class _Startable:
    """The application, for uvicorn, to which an engine that does not come up is a bug to be logged.

    Attributes:
        failure: why the engine did not come up.
    """

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self.failure: EngineUnavailable | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            # Holds a traceback; the exception itself comes right after it.
            if message["type"] != "lifespan.startup.failed":
                await send(message)

        try:
            await self._app(scope, receive, told)
        except EngineUnavailable as error:
            self.failure = error
            await send({"type": "lifespan.startup.failed"})


class Server(uvicorn.Server):
    """uvicorn's server; on SIGTERM or SIGINT it takes nothing new and finishes what it has."""

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        app: _Startable,
        started: Callable[[int], None] | None,
    ) -> None:
        super().__init__(config)
        self._gate, self._startable, self._started = gate, app, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen.

        Raises:
            OSError: it cannot be listened there.
        """
        try:
            await super().startup(sockets)
        except SystemExit:
            if self.lifespan.should_exit:  # the application's failure
                raise
            raise OSError(
                f"cannot listen on {self.config.host}, port {self.config.port}; the log says why"
            ) from None
        if self._started is not None and self.started:
            self._started(self.servers[0].sockets[0].getsockname()[1])

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop.

        Raises:
            EngineUnavailable: the engine does not come up.
            OSError: it cannot be listened there.
        """
        try:
            with _on_hangup(self._gate):
                await super().serve(sockets)
        finally:
            # Instead of the SystemExit that newer versions of uvicorn raise.
            if self._startable.failure is not None:
                raise self._startable.failure from None


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
    app: FastAPI,
    gate: Gate,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "info",
    trusted_proxies: Sequence[str] = (),
    started: Callable[[int], None] | None = None,
) -> Server:
    """A server that is ready to `run()`.

    Args:
        port: 0 takes a free one.
        trusted_proxies: addresses or networks whose `X-Forwarded-For` says who asks. From anybody
            else, this machine included, that header could claim any address, and is not read.
        started: called with the port when requests are taken.

    Raises:
        ValueError: one of them is no address and no network.
    """
    for proxy in trusted_proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise ValueError(
                f"--trusted-proxy {proxy!r}: expected an address or a network, such as 127.0.0.1 "
                "or 10.0.0.0/8"
            ) from None
    startable = _Startable(app)
    config = uvicorn.Config(
        startable,
        host=host,
        port=port,
        log_level=log_level,
        # A path may hold nothing secret, but who asked is the audit log's business.
        access_log=False,
        server_header=False,
        lifespan="on",
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_keep_alive=20,
        timeout_graceful_shutdown=gate.limits.request_seconds,
        h11_max_incomplete_event_size=32_768,
    )
    return Server(config, gate, startable, started)


@contextmanager
def serving(app: FastAPI, gate: Gate, seconds: float = 60) -> Iterator[str]:
    """Serve in a thread, on a free port of this machine, for as long as the block runs.

    Args:
        seconds: in which the server must be up.

    Yields:
        Its URL, without a path.

    Raises:
        RuntimeError: it did not come up.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = make_server(app, gate, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + seconds
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the server did not come up; its log says why")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
