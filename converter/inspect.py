"""``lathe inspect``: what a model is, what it needs, and how long it will take, before it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from onnx_lathe.benchmarks.peaks import measure_peaks
from onnx_lathe.benchmarks.roofline import SEEN_WITHIN, Estimate, estimate
from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.facts import GraphFacts, read_facts
from onnx_lathe.runtime.needs import Needs, needs

_TOP = 8
"""Operators in the table of the latency."""
_MIB = 2**20


@dataclass(frozen=True)
class Inspection:
    """What is known of a model that never ran.

    Attributes:
        facts: What it is: parameters, multiply-accumulates, operators, inputs and outputs.
        needs: The arithmetic and the memory that it needs.
        assumed: Sizes that nobody gave, of symbolic dimensions; all that depends on shapes holds for them.
        estimate: Its latency on this machine's CPU; None where it was not asked for.
    """

    facts: GraphFacts
    needs: Needs
    assumed: Mapping[str, int]
    estimate: Estimate | None


def inspect(
    model: Path, *, dims: Mapping[str, int] | None = None, threads: int | None = None, latency: bool = True
) -> Inspection:
    """Say what a model is and needs, without running it and without reading weights that lie beside it.

    The latency is computed from the graph and from peaks of this machine, which are measured for about two seconds.

    Args:
        model: An ``.onnx`` file or a bundle.
        dims: Sizes of symbolic dimensions; for the others 1 on the first axis and 16 elsewhere.
        threads: Threads that the latency is estimated for; None for all allowed cores.
        latency: Whether to estimate it; without, the machine is left alone.

    Raises:
        ModelFileError: The file is not a sound model.
        TensorError: ``dims`` names a dimension that the model does not have.
    """
    facts = read_facts(model_file(model), dims)
    assumed = {name: size for name, size in facts.dims.items() if name not in (dims or {})}
    return Inspection(facts, needs(facts), assumed, estimate(facts, measure_peaks(threads)) if latency else None)


def lines(inspection: Inspection) -> Iterator[str]:
    """Yield what there is to say of a model, for people."""
    facts, needed = inspection.facts, inspection.needs
    yield f"{facts.parameters:,} parameters, {facts.file_bytes:,} bytes, opset {facts.opset}"
    yield from (f"  input  {spec.name}: {spec.dtype} {list(spec.shape)}" for spec in facts.inputs)
    yield from (f"  output {spec.name}: {spec.dtype} {list(spec.shape)}" for spec in facts.outputs)
    yield from (f"  {count:5d} {operator}" for operator, count in facts.operators.items())
    yield "weights: " + (", ".join(f"{_size(size)} {dtype}" for dtype, size in facts.weights.items()) or "none")
    yield _shapes(inspection)
    yield (
        f"arithmetic: {'unknown' if facts.macs is None else f'{facts.macs:,} MACs, {needed.flops:,} FLOP'} in "
        "convolutions and matrix products; element by element work is not counted"
    )
    if needed.not_counted:
        counted = ", ".join(f"{count} {operator}" for operator, count in needed.not_counted.items())
        yield f"unknown arithmetic: {counted}"
    running = "unknown" if needed.run_bytes is None else f"{_size(needed.run_bytes)} of activations at least"
    yield f"memory: about {_size(needed.load_bytes)} to load (besides onnxruntime's libraries); to run, {running}"
    if inspection.estimate:
        yield from _latency(inspection.estimate)


def table(made: Estimate) -> Table:
    """Return the operators that take the most of the estimated time."""
    result = Table(title="where the time goes, estimated")
    for heading in ("operator", "nodes", "time", "share", "waits for"):
        result.add_column(heading, justify="left" if heading in ("operator", "waits for") else "right")
    seconds: dict[str, float] = defaultdict(float)
    bounds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node in made.nodes:
        seconds[node.op_type] += node.seconds
        bounds[node.op_type][node.bound] += node.seconds
    for op_type in sorted(filter(seconds.__getitem__, seconds), key=lambda name: -seconds[name])[:_TOP]:
        result.add_row(
            op_type,
            str(sum(node.op_type == op_type and node.seconds > 0 for node in made.nodes)),
            f"{1e3 * seconds[op_type]:.3f} ms",
            f"{100 * seconds[op_type] / made.seconds:.0f} %",
            max(bounds[op_type], key=bounds[op_type].__getitem__),
        )
    return result


def _shapes(inspection: Inspection) -> str:
    """Say which shapes the rest holds for, or what they would take."""
    facts, assumed = inspection.facts, inspection.assumed
    nameless = next((spec for spec in facts.inputs if None in spec.shape), None)
    if inspection.needs.unknown and nameless:
        return (
            f"shapes: unknown, as input {nameless.name!r} has a dimension without a name: {list(nameless.shape)}; "
            "export the model with named dimensions"
        )
    at = ", ".join(f"{name} {size}" for name, size in facts.dims.items()) or "all fixed"
    given = f"; assumed, --dims {','.join(f'{name}=SIZE' for name in assumed)} sets them" if assumed else ""
    unknown = f"; they depend on values at {inspection.needs.unknown}" if inspection.needs.unknown else ""
    return f"shapes: {at}{given}{unknown}"


def _latency(made: Estimate) -> Iterator[str]:
    least = "at least" if made.unknown else "about"
    yield (
        f"latency: {least} {1e3 * made.seconds:.3g} ms a call on this CPU with {made.peaks.threads} threads, estimated "
        f"from the graph (on a quiet machine within a factor of {SEEN_WITHIN:g} on the models tried); `lathe bench` "
        "measures it"
    )
    if made.unknown:
        named = ", ".join(f"{node.name} ({node.op_type})" for node in made.unknown[:3])
        yield f"  without {len(made.unknown)} nodes of unknown shapes or arithmetic: {named}"


def _size(nbytes: int) -> str:
    """Return a number of bytes for people, in MiB or KiB."""
    if nbytes >= _MIB:
        return f"{nbytes / _MIB:,.0f} MiB"
    return f"{nbytes / 1024:.1f} KiB" if nbytes >= 1024 else f"{nbytes} bytes"
