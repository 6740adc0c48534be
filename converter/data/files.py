"""Sample sets in files: an ``.npz``, or a folder of them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from tokenize import TokenError
from typing import cast

import numpy as np

from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Array, Samples

LABEL = "label"
"""The array of an ``.npz`` that is no input: a class (integer) or numbers (float) for each sample."""


def load_samples(path: Path) -> Samples:
    """Read samples from an ``.npz``, or from a folder of ``.npz`` in order of their names.

    Each file holds arrays by input name, samples along the first axis, and may hold ``label``: integers or booleans
    ``[samples]`` (returned as int64), or floats ``[samples]`` or ``[samples, outputs]`` (as they are). A file of a
    folder is a batch; shapes may differ from batch to batch, names may not.

    Raises:
        SamplesError: The path or a file of it is missing, not an ``.npz``, damaged or empty, an array holds
            Python objects, arrays are ragged or not finite, or only some files have labels.
    """
    if not path.is_dir():
        return _load_file(path)
    files = sorted(path.glob("*.npz"))
    if not files:
        raise SamplesError(
            str(path),
            got="a folder without .npz files",
            expected="one or more, each a batch",
            mend="Write batches with numpy.savez(file, input_name=array).",
        )
    parts = [_load_file(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if (part.labels is None) != (parts[0].labels is None):
            raise SamplesError(
                str(file),
                got=f"{'no labels' if part.labels is None else 'labels'}, unlike {files[0].name}",
                expected=f"{LABEL!r} in every file or in none",
                mend=f"Add {LABEL!r} to every file, or remove it from all.",
            )
        if part.labels is not None and part.labels.shape[1:] != cast(Array, parts[0].labels).shape[1:]:
            raise SamplesError(
                f"{file}: {LABEL}",
                got=f"{list(part.labels.shape)}, unlike {files[0].name}",
                expected="the same number of outputs in every file",
                mend="Give every sample the same numbers.",
            )
    batches = tuple(part.batches[0] for part in parts)
    labels = [part.labels for part in parts if part.labels is not None]
    return Samples(batches, np.concatenate(labels) if labels else None, str(path))


def _load_file(path: Path) -> Samples:
    arrays = _read(path)
    labels = arrays.pop(LABEL, None)
    return Samples((arrays,), None if labels is None else _checked_labels(path, labels), str(path))


def _read(path: Path) -> dict[str, Array]:
    if not path.exists():
        raise SamplesError(
            str(path), got="no such file", expected="an .npz or a folder of them", mend="Check the path."
        )
    if not zipfile.is_zipfile(path):
        raise SamplesError(
            str(path),
            got="a file that is not an .npz",
            expected="an .npz or a folder of them",
            mend="Write it with numpy.savez(file, input_name=array).",
        )
    try:
        # Pickled objects could run code as they are read.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: cast(Array, file[name]) for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError, OSError, MemoryError, TokenError) as error:
        raise SamplesError(
            str(path),
            got=f"an .npz that cannot be read ({error})",
            expected="arrays of numbers or strings, none of Python objects",
            mend="Write it again with numpy.savez(file, input_name=array).",
        ) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]: members of a hostile zip
            raise SamplesError(
                f"{path}: {name}",
                got="a member that is not an array",
                expected="arrays only",
                mend="Write it again with numpy.savez(file, input_name=array).",
            )
    return arrays


def _checked_labels(path: Path, labels: Array) -> Array:
    if labels.dtype.kind not in "iubf" or labels.ndim not in ((1, 2) if labels.dtype.kind == "f" else (1,)):
        raise SamplesError(
            f"{path}: {LABEL}",
            got=f"{labels.dtype} {list(labels.shape)}",
            expected="integers of shape [samples], or floats of shape [samples] or [samples, outputs]",
            mend="Give one class for each sample, or its numbers.",
        )
    if labels.dtype.kind != "f":
        return labels.astype(np.int64)
    if not np.isfinite(labels).all():
        raise SamplesError(
            f"{path}: {LABEL}",
            got="NaN or infinity",
            expected="finite scores",
            mend="Drop or repair those samples.",
        )
    return labels
