"""The Open Inference Protocol, version 2, over HTTP, as an ASGI application around a `Service`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onnx_lathe.runtime.serve import metrics, protocol
from onnx_lathe.runtime.serve.faults import RequestError, bad_request, too_large, too_slow, unauthorized
from onnx_lathe.runtime.serve.service import Service

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
T = TypeVar("T")

CLIENT_LEFT = 499
"""The status that is counted, never sent, where the client left before its answer."""
LARGE = 2**20
"""Bytes above which a request is decoded and an answer encoded in a thread, so that the event loop answers others
between their steps; within one, JSON holds Python's lock."""

_OPEN = ("/v2/health/live", "/v2/health/ready")
"""Paths that need no key: who watches over servers has none."""


def build(service: Service, lifespan: Lifespan | None = None) -> Starlette:
    """Return the application.

    Args:
        service: What it serves.
        lifespan: Starts and stops the service; None to wait for the model before the first request.
    """

    @asynccontextmanager
    async def waiting(_: Starlette) -> AsyncGenerator[None]:
        await service.start()
        yield
        await service.stop()

    app = Starlette(
        routes=_routes(_Endpoints(service)),
        middleware=[Middleware(_Guard, service=service)],
        exception_handlers={
            RequestError: _on_fault,
            HTTPException: _on_http,
            ClientDisconnect: _on_leaving,
            Exception: _on_defect,
        },
        lifespan=lifespan or waiting,
    )
    app.router.redirect_slashes = False
    return app


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def server(self, _: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return JSONResponse({"name": "onnx-lathe", "version": version("onnx-lathe"), "extensions": extensions})

    async def live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, _: Request) -> Response:
        ready = self._service.ready
        return JSONResponse({"ready": ready}, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def model(self, request: Request) -> Response:
        self._check_model(request)
        return JSONResponse(self._service.metadata())

    async def model_ready(self, request: Request) -> Response:
        self._check_model(request)
        ready = self._service.ready
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"name": self._service.name, "ready": ready}, status)

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def infer(self, request: Request) -> Response:
        self._check_model(request)
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "compressed bodies are not supported")
        service, loop = self._service, asyncio.get_running_loop()
        with service.held():
            start, limit = loop.time(), service.limits.timeout
            body = await _body(request, service.limits.max_body, None if limit is None else start + limit)
            arguments = (body, request.headers.get(protocol.HEADER_LENGTH))
            wanted = (
                protocol.decode(*arguments)
                if len(body) < LARGE
                else await asyncio.to_thread(protocol.decode, *arguments)
            )
            limits = [seconds for seconds in (limit, wanted.timeout) if seconds is not None]
            deadline = start + min(limits) if limits else None
            results = await _unless_left(request.receive, service.infer(wanted, deadline))
            size = sum(values.nbytes for values in results.values())
            encoding = (service.name, wanted, results)
            content, header = (
                protocol.encode(*encoding) if size < LARGE else await asyncio.to_thread(protocol.encode, *encoding)
            )
        if header is None:
            return Response(content, media_type="application/json")
        headers = {protocol.HEADER_LENGTH: str(header)}
        return Response(content, headers=headers, media_type="application/octet-stream")

    def _check_model(self, request: Request) -> None:
        asked = request.path_params
        if asked["model"] != self._service.name or asked.get("version", protocol.VERSION) != protocol.VERSION:
            known = f"{self._service.name!r}, version {protocol.VERSION}"
            raise RequestError(HTTPStatus.NOT_FOUND, f"no such model or version; there is {known}")


def _routes(endpoints: _Endpoints) -> list[Route]:
    routes = [
        Route("/v2", endpoints.server),
        Route("/v2/health/live", endpoints.live),
        Route("/v2/health/ready", endpoints.ready),
        Route("/metrics", endpoints.metrics),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += (
            Route(model, endpoints.model),
            Route(f"{model}/ready", endpoints.model_ready),
            Route(f"{model}/infer", endpoints.infer, methods=["POST"]),
        )
    return routes


class _Guard:
    """Asks for the key before anything of a request is read, and counts the answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, keys = scope["path"], self._service.keys
        status = CLIENT_LEFT

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        answer: ASGIApp = self._app
        if keys and path not in _OPEN and not keys.accept(dict(scope["headers"]).get(b"authorization")):
            answer = _error(unauthorized())
        try:
            await answer(scope, receive, counted)
        except Exception:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise
        finally:
            endpoint = "infer" if path.endswith("/infer") else "other"
            self._service.metrics.requests.labels(endpoint, str(int(status))).inc()


async def _body(request: Request, limit: int, deadline: float | None) -> bytearray:
    """Return the body, counted as it arrives, since its declared length may lie or be missing."""
    declared = request.headers.get("Content-Length", "0")
    if not declared.isdecimal():
        raise bad_request("Content-Length is not a number")
    # By digits first: int() refuses a number of thousands of them.
    if len(declared.lstrip("0")) > 18 or int(declared) > limit:
        raise too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise too_large(limit)
                body += chunk
    except TimeoutError:
        raise too_slow() from None
    return body


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns, and cancel it where the client leaves before.

    Raises:
        ClientDisconnect: It left.
    """
    task, left = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error(fault: RequestError) -> Response:
    return JSONResponse({"error": fault.message}, fault.status, fault.headers)


async def _on_fault(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, RequestError)
    return _error(fault)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _on_leaving(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _on_defect(_: Request, __: Exception) -> Response:
    """Say nothing of what went wrong; starlette raises it again, and the server's log has it."""
    return _error(RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "an error inside the server"))
