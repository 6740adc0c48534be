"""`lathe serve`: a model behind the Open Inference Protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lathe.runtime.errors import InputError, ModelFileError
from onnx_lathe.runtime.extras import require
from onnx_lathe.runtime.serve.keys import VARIABLE, Keys, read_keys
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.transport import TLS, is_loopback
from onnx_lathe.runtime.session import Session

if TYPE_CHECKING:
    from onnx_lathe.runtime.serve.server import Server

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    require_signature: str | Path | None = None,
    identity: str | Path | None = None,
    limits: Limits | None = None,
    keys_file: str | Path | None = None,
    allow_anonymous: bool = False,
    tls: TLS | None = None,
    grace: float = 30.0,
    started: Callable[[Server], None] | None = None,
) -> None:
    """Serve a model by the Open Inference Protocol, version 2, until SIGTERM or SIGINT; then drain and return.

    Args:
        model: An ``.onnx`` file, a bundle or an encrypted bundle.
        host: The address to listen on.
        port: The port; 0 for any that is free.
        name: The model's name for clients; None for its folder's or file's.
        provider: As in `Session`.
        threads: As in `Session`.
        require_signature: As in `Session`.
        identity: As in `Session`.
        limits: What the server allows; None for the defaults.
        keys_file: A file of bearer keys, one a line, which its owner alone may read; the environment variable
            ``LATHE_SERVE_KEYS`` adds more. Without any key everyone is answered.
        allow_anonymous: Whether others than this machine are answered without keys and client certificates.
        tls: Certificates; None for plain HTTP.
        grace: Seconds that requests may take to finish once the server is stopped.
        started: Called with the server once it listens, before the model is loaded.

    Raises:
        InputError: An option is out of range, the address or a certificate cannot be used, or the server could be
            reached from outside without keys.
        SecretError: The keys cannot be used.
        DependencyError: The packages of the extra "serve" are not installed.
        LatheError: The model cannot be loaded, as in `Session`, or the protocol cannot carry its dtypes.
    """
    require("starlette", "uvicorn", "prometheus_client", extra="serve")
    from onnx_lathe.runtime.serve.server import Server
    from onnx_lathe.runtime.serve.service import Service

    name = name or model_name(Path(model))
    check_name(name)
    keys = read_keys(None if keys_file is None else Path(keys_file))
    _check_exposure(host, keys, tls, allow_anonymous)
    if not Path(model).exists():
        raise ModelFileError(str(model), got="no such file", expected="a model or a bundle", mend="Check the path.")

    def open_session() -> Session:
        return Session(
            model, provider=provider, threads=threads, require_signature=require_signature, identity=identity
        )

    service = Service(name, open_session, limits or Limits(), keys)
    server = Server(service, host, port, tls, grace)
    if started is not None:
        started(server)
    server.run()


def check_name(name: str) -> None:
    """Check that clients can ask for a model by ``name``, which stands in paths.

    Raises:
        InputError: They cannot.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            "name", got=repr(name), expected="letters, digits and any of . _ -", mend="Give another with --name."
        )


def model_name(model: Path) -> str:
    """Return what to call a model: by its folder where it is a bundle, else by its file."""
    return model.resolve().name if model.is_dir() else model.stem


def _check_exposure(host: str, keys: Keys, tls: TLS | None, allow_anonymous: bool) -> None:
    if not (keys or allow_anonymous or is_loopback(host) or (tls is not None and tls.client_ca is not None)):
        raise InputError(
            f"host {host}",
            got="no keys, on an address that other machines reach",
            expected="keys, client certificates, or an address of this machine alone",
            mend=f"Give --keys FILE or set {VARIABLE}; or --allow-anonymous to answer everyone.",
        )
