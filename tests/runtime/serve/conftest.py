from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from onnx_lathe.runtime.serve.keys import Keys
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.server import Server
from onnx_lathe.runtime.serve.service import Service
from onnx_lathe.runtime.session import Session


class Gated:
    """A session whose runs wait for a gate once it is shut; counts the rows of each run."""

    def __init__(self, model: Path) -> None:
        self._session = Session(model, threads=1)
        self.path, self.inputs, self.outputs = self._session.path, self._session.inputs, self._session.outputs
        self.warning, self.scales_by_run = None, self._session.scales_by_run
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.rows: list[int] = []

    def run(self, feeds: Mapping[str, Any], outputs: Any = None, *, stop: Any = None) -> dict[str, Any]:
        self.rows.append(len(next(iter(feeds.values()))))
        self.entered.release()
        assert self.gate.wait(20)
        return self._session.run(feeds, outputs)

    def shut(self) -> None:
        """Let the next runs wait, and forget the ones so far."""
        self.gate.clear()
        self.rows.clear()
        while self.entered.acquire(blocking=False):
            pass


class Served:
    """A running server, and a plain HTTP client of it."""

    def __init__(self, server: Server, service: Service) -> None:
        self.server, self.service = server, service
        self.port = int(server.url.rsplit(":", 1)[1])
        self.address = f"127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Return status, decoded body and headers of one request."""
        connection = self.connect()
        try:
            content = json.dumps(body) if isinstance(body, dict) else body
            connection.request(method or ("GET" if body is None else "POST"), path, content, dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read()
            kind = answer.headers.get("content-type", "")
            return answer.status, json.loads(text) if kind == "application/json" else text, answer.headers
        finally:
            connection.close()

    def metric(self, line: str) -> float:
        """Return the value of a metric; 0 where it was not counted yet."""
        lines = self.service.metrics.text().decode().splitlines()
        return next((float(each.removeprefix(line)) for each in lines if each.startswith(f"{line} ")), 0.0)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that must within seconds."""
        end = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.005)


@contextmanager
def running(service: Service, **options: Any) -> Generator[Served]:
    server = Server(service, "127.0.0.1", 0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    served = Served(server, service)
    try:
        served.until(lambda: service.ready or not thread.is_alive())
        yield served
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def start() -> Generator[Callable[..., Served]]:
    """Start servers that end with the test: `start(session, name=..., limits=..., keys=...)`."""
    with ExitStack() as stack:

        def begin(session: Any, *, name: str = "model", limits: Limits | None = None, keys: Any = ()) -> Served:
            service = Service(name, lambda: session, limits or Limits(), Keys(keys))
            return stack.enter_context(running(service))

        yield begin
