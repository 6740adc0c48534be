"""What a request can be refused for, with the status of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus


class RequestError(Exception):
    """A request that is not answered with tensors.

    Args:
        status: Of the answer.
        message: For the client: nothing of the machine, no path.
        headers: Of the answer.
    """

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def bad_request(message: str) -> RequestError:
    """Return the fault of a request that is wrong in itself."""
    return RequestError(HTTPStatus.BAD_REQUEST, message)


def too_large(limit: int) -> RequestError:
    """Return the fault of a body over ``limit`` bytes; the connection ends with it, since the rest is not read."""
    message = f"the body is larger than {limit} bytes"
    return RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, {"Connection": "close"})


def too_many(limit: int) -> RequestError:
    """Return the fault of a request that finds ``limit`` others before it."""
    message = f"{limit} requests are being served; try again"
    return RequestError(HTTPStatus.TOO_MANY_REQUESTS, message, {"Retry-After": "1"})


def too_late() -> RequestError:
    """Return the fault of a request whose deadline passed."""
    return RequestError(HTTPStatus.GATEWAY_TIMEOUT, "the deadline of the request passed before its answer was there")


def too_slow() -> RequestError:
    """Return the fault of a request whose body did not arrive in time."""
    return RequestError(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time", {"Connection": "close"})


def unavailable(message: str) -> RequestError:
    """Return the fault of a server that is starting or stopping."""
    return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, message, {"Retry-After": "1"})


def unauthorized() -> RequestError:
    """Return the fault of a request without a valid key (RFC 6750, section 3)."""
    headers = {"WWW-Authenticate": 'Bearer realm="lathe"'}
    return RequestError(HTTPStatus.UNAUTHORIZED, "a valid bearer key is needed", headers)
