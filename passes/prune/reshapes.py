"""Rules for operators that move, merge or split axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.prune import literals
from onnx_lathe.passes.prune.literals import Length
from onnx_lathe.passes.prune.site import Operand, Site

Span = tuple[range, range]
"""Axes of the input and axes of the result that hold the same entries in the same order."""


def reshape(site: Site) -> None:
    """Tie an axis to the one it becomes, to the first it splits into, or to the one it is merged into as the first."""
    data, lengths = site.input(0), literals.read(site.node)
    if data is not None and len(lengths) == site.out.rank:
        for before, after in _spans(data.dims, site.out.dims):
            _tie_span(site, data, before, after, lengths)


def flatten(site: Site) -> None:
    """Tie the two merged axes to the first of what each was made of."""
    data = site.input(0)
    if data is None or not data.rank:
        return
    axis = site.node.attributes.get_int("axis", 1) % (data.rank + 1)
    _tie_span(site, data, range(axis), range(1))
    _tie_span(site, data, range(axis, data.rank), range(1, 2))


def transpose(site: Site) -> None:
    """Tie each axis to where it goes."""
    data = site.input(0)
    if data is None:
        return
    order = site.node.attributes.get_ints("perm", tuple(reversed(range(data.rank))))
    for axis, source in enumerate(order):
        site.tie(data, source, site.out, axis)


def squeeze(site: Site) -> None:
    """Tie the axes that stay."""
    data, axes = site.input(0), site.ints("axes", 1)
    # Without axes it drops whatever has length 1, which a cut may bring about.
    if data is not None and data.rank and axes is not None:
        _tie_kept(site, data, site.out, {axis % data.rank for axis in axes})


def unsqueeze(site: Site) -> None:
    """Tie the axes that were there before."""
    data, axes = site.input(0), site.ints("axes", 1)
    if data is not None and site.out.rank and axes is not None:
        _tie_kept(site, site.out, data, {axis % site.out.rank for axis in axes})


def _tie_kept(site: Site, longer: Operand, shorter: Operand, dropped: set[int]) -> None:
    kept = [axis for axis in range(longer.rank) if axis not in dropped]
    if len(kept) == shorter.rank:
        for axis, source in enumerate(kept):
            site.tie(longer, source, shorter, axis)


def _tie_span(site: Site, data: Operand, before: range, after: range, lengths: Sequence[Length] | None = None) -> None:
    """Tie the axis on the side that has one to the first axis on the other.

    Row-major, entry ``j`` of the merged axis lies in entry ``j // rest`` of the first, where ``rest`` is the product of
    the others: to cut an entry of the first is to cut a block of the merged axis.
    """
    first, other = _first(data, before), _first(site.out, after)
    if min(len(before), len(after)) != 1 or first is None or other is None:
        return
    if lengths is not None and not _follow(site, lengths[other], first, other):
        return
    long, short = site.slots.of(data.value, first), site.slots.of(site.out.value, other)
    if long is None or short is None or len(long) == len(short) or 0 in (len(long), len(short)):
        site.tie(data, first, site.out, other)
    elif len(long) < len(short):
        site.tie(data, first, site.out, other, left_at=np.repeat(np.arange(len(long)), len(short) // len(long)))
    else:
        site.tie(data, first, site.out, other, right_at=np.repeat(np.arange(len(short)), len(long) // len(short)))


def _first(operand: Operand, axes: range) -> int | None:
    """Return the first of ``axes`` that is not of length 1, or where all are, the first."""
    return next((axis for axis in axes if operand.dims[axis] != 1), axes[0] if len(axes) else None)


def _follow(site: Site, length: Length, source: int, axis: int) -> bool:
    """Let the length that a Reshape is told for an axis of its result follow that axis, and say whether it can."""
    if length.number is None:
        return not isinstance(site.out.dims[axis], int)
    if length.number == 0:
        return source == axis and not site.node.attributes.get_int("allowzero", 0)
    if length.number > 0:
        site.follow(length.place, site.out, axis)
    return True


def _spans(before: Sequence[int | ir.SymbolicDim], after: Sequence[int | ir.SymbolicDim]) -> list[Span]:
    """Return the smallest spans of axes that hold the same entries, found from both ends."""
    spans: list[Span] = []
    low, other = 0, 0
    while (sizes := _match(before[low:], after[other:])) is not None:
        spans.append((range(low, low + sizes[0]), range(other, other + sizes[1])))
        low, other = low + sizes[0], other + sizes[1]
    high, end = len(before), len(after)
    while (sizes := _match(before[low:high][::-1], after[other:end][::-1])) is not None:
        spans.append((range(high - sizes[0], high), range(end - sizes[1], end)))
        high, end = high - sizes[0], end - sizes[1]
    return spans


def _match(before: Sequence[int | ir.SymbolicDim], after: Sequence[int | ir.SymbolicDim]) -> tuple[int, int] | None:
    """Return how many leading axes of each hold equally many entries, the fewest possible."""
    if not before or not after:
        return None
    if before[0] == after[0]:
        known = isinstance(before[0], int) or before[0].value is not None
        return (1, 1) if known else None
    left, right = _known(before), _known(after)
    products = set(np.cumprod(left).tolist()) & set(np.cumprod(right).tolist())
    if not products:
        return None
    smallest = min(products)
    return np.cumprod(left).tolist().index(smallest) + 1, np.cumprod(right).tolist().index(smallest) + 1


def _known(lengths: Sequence[int | ir.SymbolicDim]) -> list[int]:
    """Return the leading lengths that are numbers."""
    return [length for length in takewhile(lambda item: isinstance(item, int), lengths) if isinstance(length, int)]
