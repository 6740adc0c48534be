"""How much each channel of a group matters, by the importance that was asked for.

- "magnitude": the L2 norm of a channel's weights, the mean over the group (`importance.mean_of`).
- "fluctuation": the energy ``Var(x_j) ||W_j||^2`` that each consumer loses with it.
- "interaction": what each consumer's results owe to it, `onnx_lathe.passes.prune.interaction`.
- "std": the root mean square of the weights that make it, in standard deviations of all weights of that layer. Under
  a threshold the channel goes, so that the weights say how many go: the rule ``|w| < threshold * std(w)`` for whole
  channels (docs/from-the-idea.md).

Those of the consumers fall back to magnitude where no consumer could be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.prune.groups import Consumer, Coupling, Group, Member, Role, tensor_of
from onnx_lathe.passes.prune.importance import Scores, by_channel, deviation, mean_of, squared_norms
from onnx_lathe.passes.prune.interaction import interactions
from onnx_lathe.passes.prune.refit import energies
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Array, Samples

Importance = Literal["auto", "magnitude", "fluctuation", "interaction", "std"]


def check_samples(importance: Importance, samples: Samples | None) -> None:
    """Raise SamplesError where ``importance`` needs samples and there are none."""
    if samples is None and importance in ("fluctuation", "interaction"):
        raise SamplesError(
            f"prune{{importance={importance}}}",
            got="no samples",
            expected="samples to see what channels do",
            mend="Give calibration data, or leave importance=auto.",
        )


def losses(
    model: ir.Model, consumers: Sequence[Consumer], samples: Samples | None, importance: Importance
) -> tuple[dict[Consumer, Scores], list[Refusal]]:
    """Return what each consumer loses with each entry of its input, and the consumers that could not be looked at.

    Nothing for an importance that reads no samples.

    Raises:
        SamplesError: ``samples`` do not fit the model.
    """
    if samples is None or importance in ("magnitude", "std"):
        return {}, []
    if importance == "interaction":
        return interactions(model, consumers, samples)
    found = energies(model, consumers, samples)
    return {
        consumer: energy * squared_norms(_array(consumer.weight), consumer.axis) for consumer, energy in found.items()
    }, []


def scores(group: Group, coupling: Coupling, graph: ir.Graph, lost: Mapping[Consumer, Scores]) -> Scores:
    """Return how much each channel of ``group`` matters: by what is ``lost``, or else by the weights."""
    parts: list[Scores] = []
    for consumer, entries in lost.items():
        name = consumer.weight.name or ""
        if Member(name, consumer.axis, Role.CONSUMES) in group.members:
            parts.append(by_channel(entries, coupling.axes[name, consumer.axis], group.channels))
    if not parts:
        for member in group.members:
            if member.role is not Role.CARRIES:
                entries = squared_norms(_array(graph.initializers[member.initializer]), member.axis)
                channel = coupling.axes[member.initializer, member.axis]
                parts.append(np.sqrt(by_channel(entries, channel, group.channels)))
    return mean_of(parts)


def strengths(group: Group, coupling: Coupling, graph: ir.Graph) -> Scores:
    """Return the "std" score of each channel of ``group``: the mean over the weights that make it."""
    parts: list[Scores] = []
    for member in group.members:
        if member.role is Role.PRODUCES:
            weight = _array(graph.initializers[member.initializer])
            channel = coupling.axes[member.initializer, member.axis]
            energy = by_channel(squared_norms(weight, member.axis), channel, group.channels)
            size = weight.size // weight.shape[member.axis]
            entries = by_channel(np.full(len(channel), float(size)), channel, group.channels)
            spread = deviation(weight)
            # Weights that are all the same have no threshold to lie under.
            parts.append(np.sqrt(energy / entries) / spread if spread > 0.0 else np.full(len(energy), np.inf))
    return np.mean(parts, axis=0)


def _array(value: ir.Value) -> Array:
    return files.view(tensor_of(value)).numpy()
