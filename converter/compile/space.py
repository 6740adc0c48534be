"""What compile tries: forms of a graph, each a list of passes over a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto

from onnx_lathe.passes import registry
from onnx_lathe.runtime import loading, providers


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
    "cleanup,quantize-dynamic{operators=MatMul|Gemm|Gather}",
    "cleanup,keep-skip-apart,quantize-dynamic{operators=MatMul|Gemm|Gather}",
)
"""Forms that need data to be judged, but none to be made."""

CALIBRATED_FORMS = (
    "cleanup,quantize-static",
    "cleanup,quantize-static{ranges=mse}",
    "cleanup,keep-skip-apart,quantize-static{ranges=percentile}",
    "cleanup,smooth{alpha=search},keep-skip-apart,quantize-dynamic{operators=MatMul|Gemm|Gather}",
)
"""Forms that are made from calibration data."""

_INTEGER_PASSES = ("quantize-static", "quantize-dynamic")
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def default_candidates(model: Path, with_data: bool, provider: str = "cpu") -> tuple[Candidate, ...]:
    """Return the forms worth trying on any model; without data only exact ones.

    On a CPU what is in half precision is also made float32, which it computes in anyway, and which integer kernels
    start from. That drops roundings, so that it wants data as well.
    """
    forms = (*EXACT_FORMS, *DATA_FREE_FORMS, *CALIBRATED_FORMS) if with_data else EXACT_FORMS
    halves = (tensor.data_type in _HALVES for tensor in loading.tensors(loading.read_graph(model)))
    if with_data and providers.user_name(provider) == "cpu" and any(halves):
        forms = (*EXACT_FORMS, *(f"widen,{form}" for form in forms))
    return tuple(Candidate(form, model, form) for form in forms)


def unfit(candidate: Candidate, provider: str) -> str | None:
    """Return why a form is not worth making for ``provider``; None where it is."""
    if providers.user_name(provider) != "cuda" or not candidate.passes:
        return None
    found = [request.name for request in registry.parse(candidate.passes) if request.name in _INTEGER_PASSES]
    if not found:
        return None
    return (
        f"{found[0]} is not for CUDA: that provider has no INT8 kernels, runs what is rounded in float with a copy "
        "before and after it, or leaves it to the CPU. There quantize-weights, or a model in float16, is faster."
    )
