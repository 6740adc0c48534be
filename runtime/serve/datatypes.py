"""Names of element types in the Open Inference Protocol, version 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.tensors import STRING, TensorSpec

BYTES = "BYTES"
BOOL = "BOOL"
FP16 = "FP16"

DTYPES: dict[str, np.dtype[Any]] = {
    BOOL: np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    FP16: np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BYTES: STRING,
}
"""By name; numbers are little-endian on the wire."""


def datatype(dtype: np.dtype[Any]) -> str | None:
    """Return the protocol's name of ``dtype``; None where it has none (or, as of bfloat16, numpy has no such type)."""
    return next((name for name, known in DTYPES.items() if known == dtype), None)


def check_datatypes(where: str, specs: Sequence[TensorSpec]) -> None:
    """Check that the protocol can carry every one of ``specs``.

    Raises:
        UnsupportedModelError: It has no name for a dtype; ``where`` is the model for the message.
    """
    for spec in specs:
        if datatype(spec.dtype) is None:
            raise UnsupportedModelError(
                f"{where}: {spec.name!r}",
                got=f"dtype {spec.dtype}",
                expected=f"one that can be served: {', '.join(DTYPES)}",
                mend="Cast it inside the model, and export that again.",
            )
