"""String tensors as bytes: each element after its length, 4 bytes little-endian (``BYTES`` of the protocol)."""

from __future__ import annotations

import struct

import numpy as np

from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.serve.faults import bad_request

_LENGTH = struct.Struct("<I")


def unpack(what: str, raw: memoryview, count: int) -> Array:
    """Return ``count`` strings, ``object [count]``.

    Raises:
        RequestError: ``raw`` does not hold exactly so many, or one is not UTF-8; ``what`` is the tensor, for messages.
    """
    # Each element has a length at least: a count that the bytes cannot hold is refused before the array is made.
    if count * _LENGTH.size > len(raw):
        raise bad_request(f"{what} has {len(raw)} bytes, too few for {count} elements")
    values = np.empty(count, object)
    start = 0
    for index in range(count):
        if start + _LENGTH.size > len(raw):
            raise bad_request(f"{what} ends before element {index} of {count}")
        (length,) = _LENGTH.unpack_from(raw, start)
        start += _LENGTH.size
        if length > len(raw) - start:
            raise bad_request(f"{what} has a length of {length} at element {index}; {len(raw) - start} bytes are left")
        try:
            values[index] = str(raw[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise bad_request(f"{what} has an element that is not UTF-8") from None
        start += length
    if start != len(raw):
        raise bad_request(f"{what} has {len(raw) - start} bytes after its {count} elements")
    return values


def pack(values: Array) -> bytes:
    """Return the bytes of a string tensor, its elements in order of rows."""
    parts: list[bytes] = []
    for value in values.reshape(-1).tolist():
        text = value if isinstance(value, bytes) else str(value).encode()
        parts += (_LENGTH.pack(len(text)), text)
    return b"".join(parts)
