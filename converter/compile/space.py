"""What compile tries: the axes of the space, and the forms that a search begins with.

To add an alternative, add its passes to the axis at whose place they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import TensorProto

from onnx_lathe.converter.compile.forms import PRECISION, PREPARED, REPAIR, Axis, Candidate, compose
from onnx_lathe.passes import registry
from onnx_lathe.runtime import loading, providers

WIDEN, CLEANUP = "widen", "cleanup"

_ALL = (
    Axis(WIDEN, lossy=("widen",)),
    Axis(CLEANUP, exact=("cleanup",)),
    Axis(PREPARED, exact=("fold-masks",)),
    Axis("normalizations", exact=("fuse-normalization",)),
    Axis(REPAIR, lossy=("smooth{alpha=search}", "equalize"), after_integers=True),
    Axis("slices", exact=("push-slices",)),
    Axis("tokens", exact=("flatten-tokens",), lossy=("drop-padding", "drop-padding{split_heads=false}")),
    Axis("rotary", exact=("fuse-rotary",)),
    Axis(
        "attention",
        exact=(
            "fuse-attention{form=standard}",
            "fuse-attention",
            "fuse-attention{form=packed}",
            "optimize-onnxscript",
        ),
    ),
    Axis("skips", exact=("keep-skip-apart",)),
    Axis(
        PRECISION,
        lossy=("quantize-dynamic", "quantize-static", "quantize-weights"),
        instead={"quantize-static": ("quantize-static{ranges=percentile}", "quantize-static{ranges=mse}")},
    ),
)

AXES = tuple(axis.among(registry.PASSES) for axis in _ALL)
"""In the order in which their passes are applied: what matches plain attention stands before what fuses it."""

VISITED = ("attention", "tokens", "slices", "rotary", "normalizations", "skips")
"""The axes that are tried on the best forms, what gains most where it gains at all first."""

_UNFIT = {
    "cuda": (
        ("quantize-static", "quantize-dynamic"),
        "CUDA: that provider has no INT8 kernels, runs what is rounded in float with a copy before and after it, or "
        "leaves it to the CPU. There quantize-weights, or a model in float16, is faster.",
    ),
    "openvino": (
        ("quantize-dynamic",),
        "OpenVINO: that provider computes MatMulInteger in float, with the rounding before it. There quantize-static "
        "runs in integers.",
    ),
}
"""By provider: passes that it gains nothing from, and why."""
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def first_forms(model: Path, with_data: bool, provider: str = "cpu", axes: Sequence[Axis] = AXES) -> list[Candidate]:
    """Return the forms that a search begins with: the graph cleaned and prepared, in every precision.

    On a CPU what is in half precision is made float32 first, which it computes in anyway, and which integer kernels
    start from. That drops roundings, so that it wants data as well.
    """
    cleaned = {axis.name: axis.exact[0] for axis in axes if axis.name in (CLEANUP, PREPARED) and axis.exact}
    forms = [compose(model, axes, cleaned)]
    halves = (tensor.data_type in _HALVES for tensor in loading.tensors(loading.read_skeleton(model)))
    if with_data and providers.user_name(provider) == "cpu" and any(halves):
        cleaned = {WIDEN: WIDEN, **cleaned}
        forms.append(compose(model, axes, cleaned))
    precision = next(axis for axis in axes if axis.name == PRECISION)
    forms += [compose(model, axes, {**cleaned, PRECISION: passes}) for passes in precision.choices(with_data)]
    return forms


def is_exact(candidate: Candidate, original: Path) -> bool:
    """Say whether a form computes what the original does by the passes that make it, each checked as it was applied."""
    exact = {registry.spell(request) for axis in _ALL for passes in axis.exact for request in registry.parse(passes)}
    requests = registry.parse(candidate.passes) if candidate.passes else ()
    return candidate.base == original and all(registry.spell(request) in exact for request in requests)


def unfit(candidate: Candidate, provider: str) -> str | None:
    """Return why a form is not worth making for ``provider``; None where it is."""
    passes, reason = _UNFIT.get(providers.user_name(provider), ((), ""))
    made_by = registry.parse(candidate.passes) if candidate.passes else ()
    found = [request.name for request in made_by if request.name in passes]
    return f"{found[0]} is not for {reason}" if found else None
