"""An HTTP server around a service, from its start to a drained end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from onnx_lathe.runtime.errors import LatheError
from onnx_lathe.runtime.serve import app
from onnx_lathe.runtime.serve.service import Service
from onnx_lathe.runtime.serve.transport import TLS, context, listen

_ANSWERING = 2
"""Seconds after the grace period in which the last answers leave, before uvicorn cuts connections."""
_MAX_HEADERS = 2**16
"""Bytes of the headers of a request."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server:
    """An HTTP server around a service. It listens at once, and is ready when the model is loaded.

    Args:
        service: What it serves.
        host: The address to listen on.
        port: The port; 0 for any that is free.
        tls: Certificates; None for plain HTTP.
        grace: Seconds that requests may take to finish once it is stopped.

    Attributes:
        url: Where it listens.
        name: The model's name for clients.

    Raises:
        InputError: The address or a certificate cannot be used.
    """

    def __init__(self, service: Service, host: str, port: int, tls: TLS | None = None, grace: float = 30.0) -> None:
        self._service = service
        self._failure: BaseException | None = None
        secure = None if tls is None else context(tls)
        config = uvicorn.Config(
            app.build(service, self._lifespan),
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            # Its sibling httptools knows no limit of headers.
            http="h11",
            h11_max_incomplete_event_size=_MAX_HEADERS,
            timeout_graceful_shutdown=math.ceil(grace) + _ANSWERING,
        )
        config.load()
        config.ssl = secure
        self._socket = listen(host, port)
        self._server = _Uvicorn(config, service, grace)
        self.name = service.name
        self.url = _url(self._socket, secure=tls is not None)

    def run(self) -> None:
        """Serve until `stop` is called or, in the main thread, SIGTERM or SIGINT arrives; then drain and return.

        Raises:
            LatheError: The model could not be loaded.
        """
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Drain and end; any thread may call it."""
        self._server.end()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        # Not awaited: while the model loads the server already says that it lives.
        loading = asyncio.create_task(self._service.start())
        loading.add_done_callback(self._loaded)
        yield
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError, LatheError):
            await loading
        await self._service.stop()

    def _loaded(self, loading: asyncio.Task[None]) -> None:
        if not loading.cancelled() and (failure := loading.exception()) is not None:
            self._failure = failure
            self._server.end()


class _Uvicorn(uvicorn.Server):
    """uvicorn whose end drains a service, and whose process does not die of the signal that it obeyed."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace

    def end(self) -> None:
        self._service.drain()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers; what has none after the grace period is answered that the server ends."""
        cut = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cut.cancel()

    async def _cut(self) -> None:
        await asyncio.sleep(self._grace)
        await self._service.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.end()


def _url(listener: socket.socket, *, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{shown}:{port}"
