"""What a quantization is: which integers stand for which real numbers.

Everywhere ``x_hat = scale * (q - zero_point)`` with ``q = clamp(round(x / scale) + zero_point, low, high)``, rounding
half to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Ranges = Literal["minmax", "percentile", "mse", "kl"]
"""How the range of a value is chosen from its histogram (`onnx_lathe.passes.quantize.params.choose_range`)."""

WeightBits = Literal[7, 8]
WeightExponent = Annotated[int, Field(ge=-60, le=60)]
"""Of a step 2^k: within these bounds its product with the scale of an input is a normal float32."""


@dataclass(frozen=True)
class Affine:
    """How a value that is computed is rounded: uint8, one scale and one zero point for the whole tensor.

    Attributes:
        scale: The distance of two neighbouring levels; exact in float32.
        zero_point: The level of 0.0, in 0..255.
    """

    scale: float
    zero_point: int


@dataclass(frozen=True)
class WeightScheme:
    """How constant weights are rounded: int8, symmetric, zero point 0.

    Attributes:
        bits: 8 uses -127..127; 7 uses -63..63, for CPUs that add two 8-bit products in 16 bits and saturate.
        per_channel: One scale an output channel instead of one a tensor.
        power_of_two: Scales are rounded up to powers of two: multiplication by them is a shift (fixed point).
        exponent: Where given, every scale is ``2^exponent``, whatever the weights are; what lies beyond the largest
            level is clamped.
    """

    bits: WeightBits = 8
    per_channel: bool = True
    power_of_two: bool = False
    exponent: int | None = None

    @property
    def limit(self) -> int:
        """The largest level."""
        return int(2 ** (self.bits - 1) - 1)


def exact_weight_bits(cpu_class: str) -> WeightBits:
    """Return how many bits a weight may have so that integer products are summed exactly on a class of CPU.

    x86 before VNNI multiplies uint8 by int8 with ``vpmaddubsw``, which adds two products in 16 bits and saturates:
    2 * 255 * 127 does not fit, 2 * 255 * 63 does.

    Args:
        cpu_class: As `onnx_lathe.runtime.providers.cpu_class` names it, such as "x86_64 avx512-vnni".
    """
    machine, _, kernels = cpu_class.partition(" ")
    saturates = machine in ("x86_64", "amd64", "i686") and kernels in ("avx512", "avx2", "baseline")
    return 7 if saturates else 8
