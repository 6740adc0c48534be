"""Zeroing small weights, one by one: masks, as the literature has them.

"std" zeroes ``|w| < threshold * std(w)``, the rule of the idea (docs/from-the-idea.md) and of Han et al. 2015
(arXiv:1506.02626); "magnitude" the smallest entries up to a share. Both are decided for each weight by itself. The
graph keeps its size and its arithmetic: onnxruntime multiplies by zeros as by other numbers, so that nothing gets
faster. What gets smaller is the file once it is compressed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.prune.groups import is_weight, tensor_of
from onnx_lathe.passes.prune.importance import deviation
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples

_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_LEAST_RANK = 2
_SAMPLE, _SAMPLES = 2**14, 8
"""Entries in a piece of a weight that is compressed to see how small it gets, and such pieces."""


@dataclass(frozen=True)
class Sparsify(Request):
    """Zero small weights one by one, for smaller downloads once compressed; nothing gets faster.

    Training afterwards fills the zeros again; quantization keeps them.

    Attributes:
        rule: "std" zeroes what lies under ``threshold`` standard deviations of its weight, "magnitude" the smallest
            ``ratio`` of each weight.
        threshold: Of "std".
        ratio: Of "magnitude".
    """

    name: ClassVar[str] = "sparsify"

    rule: Literal["std", "magnitude"] = "std"
    threshold: Annotated[float, Field(gt=0.0)] = 0.5
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> SmallWeightsZeroed:
        """Find where to cut in each weight.

        Raises:
            UnsupportedModelError: There is no weight with anything to zero.
        """
        del samples, score
        masks: list[Mask] = []
        for name in _weights(model.graph):
            weight = files.view(tensor_of(model.graph.initializers[name])).numpy()
            cut = self.threshold * deviation(weight) if self.rule == "std" else _smallest(weight, self.ratio)
            # As the weight's own type has it, so that every comparison is the same.
            mask = _mask(name, weight, float(weight.dtype.type(cut)))
            if mask.zeroed:
                masks.append(mask)
        if not masks:
            raise UnsupportedModelError(
                self.name,
                got="no float weight of a Conv, Gemm or MatMul with an entry to zero",
                expected="weights under the threshold that are not zero",
                mend="Raise the threshold or the ratio; sparsify before quantization, not after.",
            )
        return SmallWeightsZeroed(tuple(masks))


@plain_dataclass(frozen=True)
class Mask:
    """What happens to one weight.

    Attributes:
        weight: The initializer.
        cut: Entries of a smaller magnitude become zero.
        entries: How many there are.
        zeroed: How many become zero.
        zeros: How many are zero then.
        bytes: Of the weight.
        compressed_before: Of the weight, compressed by zlib, estimated from pieces.
        compressed_after: The same with its zeros.
    """

    weight: str
    cut: float
    entries: int
    zeroed: int
    zeros: int
    bytes: int
    compressed_before: int
    compressed_after: int


@plain_dataclass(frozen=True)
class SmallWeightsZeroed(Edit):
    """A plan of zeros.

    Attributes:
        masks: The weights that get some.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "the same products summed in another order, through a whole network in float32", relative=1e-4
    )

    masks: tuple[Mask, ...]

    def describe(self) -> Mapping[str, Any]:
        """Return the share of zeros and the estimated compressed size, in all and by weight."""
        entries, zeros = sum(mask.entries for mask in self.masks), sum(mask.zeros for mask in self.masks)
        return {
            "zeros": zeros / entries,
            "bytes": sum(mask.bytes for mask in self.masks),
            "compressed_before": sum(mask.compressed_before for mask in self.masks),
            "compressed_after": sum(mask.compressed_after for mask in self.masks),
            "weights": [
                {"initializer": mask.weight, "cut": mask.cut, "zeros": mask.zeros / mask.entries} for mask in self.masks
            ],
        }

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Zero what is not zero yet.

        Raises:
            UnsupportedModelError: This is not the model that was planned for.
        """
        modified = False
        for mask in self.masks:
            value = model.graph.initializers.get(mask.weight)
            if value is None or tensor_of(value).size != mask.entries:
                raise UnsupportedModelError(
                    f"initializer {mask.weight!r}",
                    got="no such weight" if value is None else f"{tensor_of(value).size} entries",
                    expected=f"{mask.entries} entries, as in the model that was planned for",
                    mend="Plan for this model.",
                )
            tensor = tensor_of(value)
            if any(_small(block, mask.cut).any() for block in files.blocks(files.view(tensor).numpy())):
                compute = partial(_zeroed, cut=mask.cut)
                value.const_value = files.lazy(mask.weight, tensor, compute, tensor.dtype, tuple(tensor.shape.numpy()))
                modified = True
        return ir.passes.PassResult(model, modified)

    def reference(self, model: ir.Model) -> None:
        """Zero the same entries at once, in numpy."""
        for mask in self.masks:
            value = model.graph.initializers[mask.weight]
            weight = tensor_of(value).numpy()
            value.const_value = ir.tensor(weight * (np.abs(weight) >= mask.cut), tensor_of(value).dtype, mask.weight)


def _weights(graph: ir.Graph) -> Iterator[str]:
    """Yield the names of the float weights that layers multiply by, each once."""
    seen: set[str] = set()
    for node in graph:
        if node.op_type not in _OPERATORS or node.domain != "":
            continue
        for value in node.inputs[:2]:
            if value is None or not is_weight(value) or value.dtype not in _FLOATS or value.name in seen:
                continue
            if len(tensor_of(value).shape) >= _LEAST_RANK:
                seen.add(value.name or "")
                yield value.name or ""


def _smallest(weight: Array, ratio: float) -> float:
    """Return the magnitude of the smallest entry that stays where ``ratio`` of them shall go; ties stay."""
    magnitudes = np.abs(weight).reshape(-1)
    gone = math.floor(ratio * magnitudes.size)
    return float(np.partition(magnitudes, gone)[gone])


def _mask(name: str, weight: Array, cut: float) -> Mask:
    zeroed = sum(int(np.count_nonzero(_small(block, cut))) for block in files.blocks(weight))
    zeros = weight.size - sum(int(np.count_nonzero(block)) for block in files.blocks(weight))
    before = after = looked_at = 0
    flat = weight.reshape(-1)
    for start in np.linspace(0, max(flat.size - _SAMPLE, 0), _SAMPLES, dtype=np.int64):
        piece = flat[start : start + _SAMPLE]
        looked_at += piece.nbytes
        before += len(zlib.compress(piece.tobytes()))
        after += len(zlib.compress(_zeroed(piece, cut).tobytes()))
    return Mask(
        weight=name,
        cut=cut,
        entries=weight.size,
        zeroed=zeroed,
        zeros=zeros + zeroed,
        bytes=weight.nbytes,
        compressed_before=round(before * weight.nbytes / looked_at),
        compressed_after=round(after * weight.nbytes / looked_at),
    )


def _small(block: Array, cut: float) -> Array:
    """Return which entries become zero: none that is zero already."""
    return (np.abs(block) < cut) & (block != 0)


def _zeroed(weight: Array, cut: float) -> Array:
    return np.where(np.abs(weight) < cut, weight.dtype.type(0), weight)
