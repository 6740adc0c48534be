"""Where a server listens, and the certificates that it shows and asks for."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.secrets import read_secret

BACKLOG = 2048


@dataclass(frozen=True)
class TLS:
    """Encryption of the connections.

    Attributes:
        certificate: The server's certificate chain (PEM).
        key: Its private key (PEM, without a passphrase).
        client_ca: Certificates (PEM) of which one must have signed each client's; None to ask for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


def tls_files(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TLS | None:
    """Return what the files of a certificate and its key give; None where there are none.

    Raises:
        InputError: One is given without the other, or a client CA without both.
    """
    if certificate is not None and key is not None:
        return TLS(certificate, key, client_ca)
    if certificate is None and key is None and client_ca is None:
        return None
    raise InputError(
        "TLS",
        got="only some of its files",
        expected="a certificate and its key, and perhaps a client CA",
        mend="Give --tls-certificate and --tls-key together.",
    )


def context(tls: TLS) -> ssl.SSLContext:
    """Return the context of a server: TLS 1.2 or newer, Python's own choice of ciphers.

    Raises:
        InputError: A file is missing or not what it must be.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    read_secret(tls.key, "the private key of a TLS certificate")
    # A password is offered, an empty one, lest OpenSSL asks for it on the terminal.
    _load("TLS certificate and key", lambda: made.load_cert_chain(tls.certificate, tls.key, password=""))
    if (ca := tls.client_ca) is not None:
        _load("TLS client CA", lambda: made.load_verify_locations(ca))
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on ``host`` and ``port`` (0: any that is free).

    Raises:
        InputError: The address is not of this machine, or the port is taken or reserved.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{host}:{port}",
            got=f"an address that cannot be listened on ({reason})",
            expected="an address of this machine and a free port",
            mend="Give another --host or --port; port 0 takes any that is free.",
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _load(where: str, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        raise InputError(
            where,
            got=f"files that cannot be used ({reason or 'no valid PEM'})",
            expected="PEM files that belong together, the key without a passphrase",
            mend="Check the paths and that the key is the certificate's.",
        ) from None
