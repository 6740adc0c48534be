"""Samples that are made, not collected: for networks of any size, where their data is not the point."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from onnx_lathe.runtime.errors import RecipeError
from onnx_lathe.runtime.samples import Samples

Count = Annotated[int, Field(ge=1)]
_SPELLED = re.compile(r"regression(?:\{([^{}]*)\})?")
_FEATURES = 4
"""Hidden features of the function for each factor."""
_BEND = 1.5
"""Scale of what tanh is taken of: a linear model explains four fifths of the variance."""


@dataclass(frozen=True)
class Regression:
    """A smooth function of few factors that are hidden in many inputs: learnable from few samples, up to noise.

    Factors ``z ~ N(0, 1)`` make inputs ``x = z A`` and outputs ``y = tanh(z B + b) C + noise``, the tanh standardized;
    A, B, b and C are normal, scaled so that inputs and outputs have a variance of about 1.

    Attributes:
        samples: How many.
        inputs: Numbers in a sample.
        outputs: Numbers to predict.
        factors: Dimensions that the inputs really vary in.
        noise: Standard deviation of what cannot be predicted.
        seed: Of the function, the samples and the noise.
    """

    samples: Count = 2000
    inputs: Count = 1000
    outputs: Count = 1000
    factors: Count = 6
    noise: Annotated[float, Field(ge=0.0)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 0

    def make(self) -> Samples:
        """Return the samples: input ``x`` float32 ``[samples, inputs]``, labels float32 ``[samples, outputs]``."""
        generator = np.random.default_rng(self.seed)
        features = _FEATURES * self.factors
        mixing = generator.normal(size=(self.factors, self.inputs)) / np.sqrt(self.factors)
        bending = _BEND * generator.normal(size=(self.factors, features)) / np.sqrt(self.factors)
        shift = _BEND * generator.normal(size=features)
        reading = generator.normal(size=(features, self.outputs)) / np.sqrt(features)
        factors = generator.normal(size=(self.samples, self.factors))
        noise = self.noise * generator.normal(size=(self.samples, self.outputs))
        bent = np.tanh(factors @ bending + shift)
        bent -= bent.mean(axis=0)
        labels = bent / bent.std() @ reading + noise
        x = (factors @ mixing).astype(np.float32)
        return Samples(({"x": x},), labels.astype(np.float32), f"regression, seed {self.seed}")


def parse(source: str, key: str) -> Regression | None:
    """Return what ``regression`` or ``regression{option=value,...}`` spells; None for other text.

    Args:
        source: The text.
        key: Where it stands, for messages.

    Raises:
        RecipeError: An option or a value is unknown.
    """
    match = _SPELLED.fullmatch(source.strip())
    if match is None:
        return None
    known = [field.name for field in fields(Regression)]
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in (match[1] or "").split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                f"{key}: regression{{{name}}}",
                got="an unknown option",
                expected=f"one of {', '.join(known)}",
                mend=f"Did you mean {near[0]!r}?" if near else "Remove the option.",
            )
        options[name] = value
    try:
        return TypeAdapter(Regression).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"{key}: regression{{{first['loc'][0]}}}",
            got=repr(first["input"]),
            expected=first["msg"].removeprefix("Input should be "),
            mend="Change the value.",
        ) from None
