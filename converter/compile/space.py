"""What compile tries: forms of a graph, each a list of passes over a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Candidate:
    """A form to try.

    Attributes:
        name: How the report calls it.
        base: The model that the passes start from.
        passes: The passes as text; empty for the base as it is.
    """

    name: str
    base: Path
    passes: str


EXACT_FORMS = ("cleanup", "cleanup,keep-skip-apart")
"""What may be tried without data: rewrites that compute the same."""

DATA_FREE_FORMS = (
    "cleanup,quantize-dynamic",
    "cleanup,quantize-dynamic{operators=MatMul|Gemm}",
    "cleanup,keep-skip-apart,quantize-dynamic{operators=MatMul|Gemm}",
)
"""Forms that need data to be judged, but none to be made."""

CALIBRATED_FORMS = (
    "cleanup,quantize-static",
    "cleanup,quantize-static{ranges=mse}",
    "cleanup,keep-skip-apart,quantize-static",
)
"""Forms that are made from calibration data."""


def default_candidates(model: Path, with_data: bool) -> tuple[Candidate, ...]:
    """Return the forms worth trying on any model; without data only exact ones."""
    forms = (*EXACT_FORMS, *DATA_FREE_FORMS, *CALIBRATED_FORMS) if with_data else EXACT_FORMS
    return tuple(Candidate(form, model, form) for form in forms)
