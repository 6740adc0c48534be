"""Bearer keys: read from a file or the environment, held as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path

from onnx_lathe.runtime.errors import SecretError
from onnx_lathe.runtime.secrets import read_secret

VARIABLE = "LATHE_SERVE_KEYS"
"""The environment variable with keys, separated by commas or white space."""
MIN_LENGTH = 16

_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What a bearer token may consist of (RFC 6750, section 2.1)."""
_SCHEME = b"bearer "


class Keys:
    """The keys that a server accepts; empty where it accepts everyone.

    Only digests are kept, so that no message, log or dump of this object holds a key.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple({_digest(key.encode()) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: bytes | None) -> bool:
        """Say whether the header ``Authorization`` holds a known key, in the same time for every wrong one."""
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        offered = _digest(authorization[len(_SCHEME) :].strip())
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(offered, digest)
        return found


def read_keys(file: Path | None) -> Keys:
    """Return the keys in ``file``, one a line, after # comments, and those in the environment variable `VARIABLE`.

    Raises:
        SecretError: There is no such file, others may read it, it holds no key, or one is too short or malformed.
    """
    found: list[str] = []
    if file is not None:
        where = str(file)
        lines = _decode(where, read_secret(file, "a file of keys")).splitlines()
        named = [(number, line.strip()) for number, line in enumerate(lines, 1) if not line.lstrip().startswith("#")]
        found = [_check(f"{where}: line {number}", line) for number, line in named if line]
        if not found:
            raise SecretError(where, got="no key", expected="one key a line", mend="Add a key, or leave it out.")
    inherited = os.environ.get(VARIABLE, "").replace(",", " ").split()
    return Keys([*found, *(_check(f"${VARIABLE}: key {number}", key) for number, key in enumerate(inherited, 1))])


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _decode(where: str, content: bytes) -> str:
    try:
        return content.decode("ascii")
    except UnicodeDecodeError:
        raise SecretError(
            where, got="bytes that are not ASCII", expected="one key a line", mend="Write the keys as ASCII text."
        ) from None


def _check(where: str, key: str) -> str:
    if len(key) < MIN_LENGTH or not _KEY.fullmatch(key):
        raise SecretError(
            where,
            got=f"{len(key)} characters",
            expected=f"a key of at least {MIN_LENGTH} letters, digits or any of . _ ~ + / - (and = at the end)",
            mend="Make one with: openssl rand -hex 32",
        )
    return key
