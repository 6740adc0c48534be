"""One model being served: its session, its batches, and whether it is ready. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import TensorError
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.serve import protocol, warm
from onnx_lathe.runtime.serve.batching import Batcher
from onnx_lathe.runtime.serve.datatypes import check_datatypes
from onnx_lathe.runtime.serve.faults import RequestError, bad_request, too_many, unavailable
from onnx_lathe.runtime.serve.keys import Keys
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.metrics import Metrics
from onnx_lathe.runtime.session import Session

log = logging.getLogger("onnx_lathe.serve")

_STARTING = "the model is being loaded"
_STOPPING = "the server is stopping"


class Service:
    """A model that answers requests of the Open Inference Protocol.

    Args:
        name: The model's name for clients.
        open_session: Returns the session; called in a thread.
        limits: What it allows.
        keys: Who may ask; everyone where empty.

    Attributes:
        name: The model's name for clients.
        limits: What it allows.
        keys: Who may ask.
        metrics: What it counts.
        alone: Why requests are not joined; None where they are.
    """

    def __init__(self, name: str, open_session: Callable[[], Session], limits: Limits, keys: Keys) -> None:
        self.name, self.limits, self.keys = name, limits, keys
        self.metrics = Metrics()
        self.alone: str | None = None
        self._open_session = open_session
        self._session: Session | None = None
        self._batcher: Batcher | None = None
        self._stopping = False
        self._held = 0

    @property
    def ready(self) -> bool:
        """Whether it answers requests."""
        return self._batcher is not None and not self._stopping

    async def start(self) -> None:
        """Load the model and warm it up, off the event loop.

        Raises:
            LatheError: As `Session`; or the protocol cannot carry the model's dtypes.
        """
        session, self.alone = await asyncio.to_thread(self._load)
        if session.warning:
            log.warning("%s", session.warning)
        if self.alone and self.limits.max_batch > 1:
            log.warning("%s", self.alone)
        joins = self.alone is None and self.limits.max_batch > 1
        self._session = session
        self._batcher = Batcher(session.run, joins=joins, limits=self.limits, metrics=self.metrics)

    def drain(self) -> None:
        """Be no longer ready, and take no new requests; those that are held are still answered."""
        self._stopping = True

    async def stop(self) -> None:
        """End; what still waits is answered that the server is stopping."""
        self.drain()
        if self._batcher is not None:
            await self._batcher.close()

    def metadata(self) -> dict[str, Any]:
        """Return what the model needs and returns.

        Raises:
            RequestError: It is not loaded yet.
        """
        session = self._loaded()
        return protocol.describe(self.name, session.inputs, session.outputs)

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold one request.

        Raises:
            RequestError: The server is starting or stopping, or holds as many as it may.
        """
        self._loaded()
        if self._stopping:
            raise unavailable(_STOPPING)
        if self._held >= self.limits.max_requests:
            raise too_many(self.limits.max_requests)
        self._held += 1
        self.metrics.held.set(self._held)
        try:
            yield
        finally:
            self._held -= 1
            self.metrics.held.set(self._held)

    async def infer(self, request: protocol.Request, deadline: float | None) -> Mapping[str, Array]:
        """Answer a decoded request by the event loop's time ``deadline``.

        Raises:
            RequestError: Its tensors are wrong, its deadline passed, or the server is starting or stopping.
        """
        session, batcher = self._loaded(), self._batcher
        if batcher is None:
            raise unavailable(_STARTING)
        names: Sequence[str] = tuple(request.binary)
        try:
            feeds = tensors.check_feeds(session.inputs, request.feeds)
            tensors.check_names("output", names, [spec.name for spec in session.outputs])
            return await batcher.infer(feeds, names, deadline)
        except TensorError as error:
            raise self._refusal(session, error) from None

    def _load(self) -> tuple[Session, str | None]:
        session = self._open_session()
        check_datatypes(str(session.path), (*session.inputs, *session.outputs))
        return session, warm.warm_up(session)

    def _loaded(self) -> Session:
        if self._session is None:
            raise unavailable(_STARTING)
        return self._session

    def _refusal(self, session: Session, error: TensorError) -> RequestError:
        """Return ``error`` for the client: by the model's name, never by its place on this machine."""
        return bad_request(str(error).replace(str(session.path), self.name))
