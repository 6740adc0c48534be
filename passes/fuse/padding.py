"""Padding left out: the graph itself takes the real tokens, as its attention mask says, wherever tokens stay apart.

Linear layers, activations and normalizations then run on the tokens that are there; only attention sees the padded
form. The first place of each sentence is kept too, real or not: there is always a row to compute, and what reads the
first token finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.fuse.padded import Proof, TokensMixedError
from onnx_lathe.passes.fuse.probe import Probe, probe
from onnx_lathe.passes.fuse.real_rows import RealRows, Turn, joins, splits
from onnx_lathe.passes.fuse.stretch import drop_unused, name, values_of
from onnx_lathe.passes.fuse.tokens import Region, find_region, is_rewritten, rewrite
from onnx_lathe.passes.oracle import Check, Tolerance, compare
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Feeds, Samples
from onnx_lathe.runtime.session import Session

SUFFIX = "_padded"
"""What the nodes end in that put tokens back among padding."""
_LONGER = (131, 53, 29)
"""Tokens of a sentence that is longer than windows of attention reach, and of some for shorter tables of positions."""
_LEAST_OPSET = 11
"""The first with CumSum and Range."""


@dataclass(frozen=True)
class DropPadding(Request):
    """Compute only the real tokens, as the attention mask says; what is returned for padded places becomes 0.

    Attributes:
        split_heads: Whether tokens are put back and taken with the heads of attention apart, which saves its
            Transposes; without, attention stays as it is, for passes that look for it.
    """

    name: ClassVar[str] = "drop-padding"

    split_heads: bool = True

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> PaddingDropped:
        """Find the mask, the parts that treat each token by itself, and the proof that padding changes no token.

        Raises:
            UnsupportedModelError: There is no such mask or part, or padding could change what is computed for a token.
        """
        del samples, score
        if model.opset_imports.get("", 1) < _LEAST_OPSET:
            raise self._refused(f"opset {model.opset_imports.get('', 1)}", f"opset {_LEAST_OPSET} or later")
        known = probe(model)
        masks = _masks(model, known)
        reasons: list[str] = []
        for mask in masks:
            try:
                planned = _planned(model, known, mask, split_heads=self.split_heads)
            except TokensMixedError as error:
                reasons.append(f"with {mask!r} as the mask, {error}")
            else:
                if planned is not None:
                    return planned
        if not reasons:
            raise self._refused(
                "no linear layer on tokens" if masks else "no input [batch, tokens] of free sizes",
                "a network of tokens with an attention mask as input",
            )
        raise self._refused("; ".join(reasons), "tokens that meet in masked attention or masked sums alone")

    def _refused(self, got: str, expected: str) -> UnsupportedModelError:
        return UnsupportedModelError(self.name, got=got, expected=expected, mend="Leave the pass out.")


@plain_dataclass(frozen=True)
class PaddingDropped(Edit):
    """A region that computes the real tokens alone.

    What the graph returns for a real token, or for a sentence, is what it was. What it returns for a padded place is 0.
    A sentence without a real token gets numbers without a meaning, as before. The products assume finite numbers.

    Attributes:
        mask: The input that is 0 where a token is padding, ``[batch, tokens]``.
        region: The nodes that compute rows.
        zeroed: The outputs with a place for each token, and how many dimensions they have.
        splits: Exits whose rows come back with the heads of attention apart.
        joins: Entries whose rows are taken from heads.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same sums for each real token, of products in another blocking (seen: 2e-6 of the largest in 12 layers).",
        relative=1e-5,
    )

    mask: str
    region: Region
    zeroed: Mapping[str, int]
    splits: tuple[Turn, ...] = ()
    joins: tuple[Turn, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return asdict(self)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the region between a selection of real tokens and their return among padding."""
        if is_rewritten(model, self.region, SUFFIX):
            return ir.passes.PassResult(model, modified=False)
        builder = Builder(model.graph, WeightScheme())
        values = values_of(model.graph)
        heads = sorted({turn.heads for turn in (*self.splits, *self.joins)})
        rows = RealRows(builder, values[self.mask], self.joins, heads)
        model.graph.insert_before(model.graph[0], rows.nodes)
        rewrite(model, self.region, builder, rows.enter, rows.leave, SUFFIX)
        for turn in self.splits:
            rows.split(model.graph, turn)
        drop_unused([values[turn.border] for turn in self.joins])
        for output, rank in self.zeroed.items():
            rows.zero(model.graph, output, rank)
        return ir.passes.PassResult(model, modified=True)

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare real tokens under masks of every kind; padded places must be 0."""
        original, edited = Session(before, optimize=False), Session(after)
        checks: list[Check] = []
        for kind, mask, sentences in _kinds(feeds[self.mask]):
            masked = {**feeds, self.mask: mask}
            want, got = original.run(masked), edited.run(masked)
            for output in self.zeroed:
                real = (mask != 0).reshape(*mask.shape, *[1] * (want[output].ndim - 2))
                want[output] = np.where(real, want[output], np.zeros((), want[output].dtype))
            check = compare(_of(got, sentences), _of(want, sentences), self.tolerance)
            checks.append(replace(check, what=f"{check.what}, {kind}"))
        return (max(checks, key=lambda check: np.nan_to_num(check.measured, nan=np.inf)),)


def _of(outputs: Mapping[str, Array], sentences: slice) -> Mapping[str, Array]:
    """Return what was computed for some sentences; what has no batch axis is left out where not all are asked for."""
    return (
        dict(outputs)
        if sentences == slice(None)
        else {key: each[sentences] for key, each in outputs.items() if each.ndim}
    )


def _kinds(mask: Array) -> Iterator[tuple[str, Array, slice]]:
    """Yield masks of the shape of ``mask``, each with its name and the sentences that have a real token."""
    batch, tokens = len(mask), int(mask.shape[1])
    lengths = np.arange(batch) * (tokens - 1) // max(batch - 1, 1) + 1
    right = np.arange(tokens)[None] < lengths[:, None]
    holes = np.random.default_rng(0).random(mask.shape) < 0.5
    holes[np.arange(batch), np.arange(batch) % tokens] = True
    one, every = slice(1, None), slice(None)
    if (mask != 0).any(1).all():
        yield "the mask as it is", mask, every
    for kind, real, sentences in (
        ("no padding", np.ones_like(right), every),
        ("padding on the right", right, every),
        ("padding on the left", right[:, ::-1], every),
        ("padding anywhere", holes, every),
        ("a sentence of padding", right & (np.arange(batch)[:, None] > 0), one),
    ):
        yield kind, np.ascontiguousarray(real).astype(mask.dtype), sentences


def _masks(model: ir.Model, known: Probe) -> list[str]:
    """Return the inputs ``[batch, tokens]`` of free sizes, those first whose names say that they are masks."""
    found = [
        value.name or ""
        for value in model.graph.inputs
        if not value.is_initializer()
        and set(shape := known.shape(value) or ()) <= known.symbolic
        and len(set(shape)) == len(shape) == 2
    ]
    return sorted(found, key=lambda each: "mask" not in each.lower())


def _planned(model: ir.Model, known: Probe, mask: str, *, split_heads: bool) -> PaddingDropped | None:
    batch, tokens = known.shapes[mask]
    zero = {each for each, state in Proof(model, known, mask).states.items() if state.masked}
    region = find_region(model, known, (batch, tokens), kept_out=zero)
    if region is None:
        return None
    longer = _longer(model, known)
    if longer is not None:
        Proof(model, longer, mask, region)
    proof = Proof(model, known, mask, region)
    zeroed: dict[str, int] = {}
    for value in model.graph.outputs:
        dirty, shape = proof.state(value).dirty, known.shapes.get(name(value), ())
        if not dirty:
            continue
        producer = value.producer()
        assert producer is not None, "no input holds tokens of a region"
        if shape[:2] != (batch, tokens) or dirty != frozenset([proof.row_place(value)]) or value.dtype is None:
            raise TokensMixedError(producer, "returns tokens in another form than [batch, tokens, ...]")
        zeroed[name(value)] = len(shape)
    if not split_heads:
        return PaddingDropped(mask, region, zeroed)
    turns = (tuple(find(model, known, region, (batch, tokens))) for find in (splits, joins))
    return PaddingDropped(mask, region, zeroed, *turns)


def _longer(model: ir.Model, known: Probe) -> Probe | None:
    """Return what is known of longer sentences, where a window of attention may hide keys that short ones do not have.

    None where the model takes none, as its table of positions ends.
    """
    for least in _LONGER:
        longer = probe(model, least)
        if longer.shapes.keys() == known.shapes.keys():
            return longer
    return None
