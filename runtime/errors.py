"""Every error that a user can cause, with its exit status.

One shape for all: *where* (the file, tensor, key or option), what was *got*, what was *expected*, and how to *mend* it.
"""

from __future__ import annotations

from typing import ClassVar


class LatheError(Exception):
    """Base of every error that the toolchain raises on purpose.

    Args:
        where: The file, tensor, recipe key, pass or option at fault.
        got: What was found there.
        expected: What would have been right.
        mend: What the user can do about it, as an imperative sentence.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, where: str, *, got: str, expected: str, mend: str) -> None:
        super().__init__(where, got, expected, mend)
        self.where = where
        self.got = got
        self.expected = expected
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.where}: got {self.got}, expected {self.expected}. {self.mend}"


class InputError(LatheError):
    """Bad usage or bad input: exit status 2."""

    exit_status = 2


class RecipeError(InputError):
    """A recipe lacks a key, has an unknown one, or a value is out of range."""


class ModelFileError(InputError):
    """A model file is missing, truncated, hostile or not ONNX."""


class ExternalDataError(ModelFileError):
    """The weights beside a model are missing, too short, or lie outside its folder."""


class TensorError(InputError):
    """A tensor handed to a model has a wrong name, dtype or shape, or values that are not finite."""


class SamplesError(InputError):
    """A sample set is empty, ragged, lacks an input, or holds values that are not finite."""


class PassSpecError(InputError):
    """A pass or an option of one is unknown or out of range."""


class UnsupportedModelError(InputError):
    """A pass cannot handle this model at all (already quantized, no operator to work on, opset too old)."""


class ProviderError(InputError):
    """An execution provider is missing, or did not take the nodes it was asked to."""


class DependencyError(InputError):
    """An optional dependency is missing, or two that exclude each other are installed."""


class BundleError(InputError):
    """A bundle is incomplete, or its files do not match its manifest."""


class TrainingError(InputError):
    """Training met a loss or data that is not finite."""


class OracleError(LatheError):
    """An edit of the graph, or an export, does not compute what it must: a defect, nothing is written."""


class MeasurementError(LatheError):
    """A measurement could not be taken: a worker failed, or no benchmark ran."""


class OutputError(InputError):
    """Nothing can be written where it was asked for."""


class SignatureError(InputError):
    """A signature is missing, does not fit the files, or its key cannot be used."""


class SecretError(InputError):
    """A secret (a private key, an age identity) cannot be used, or others may read it."""
