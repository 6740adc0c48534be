"""The passes by name, and the translation between text, JSON and requests.

Grammar: ``NAME`` or ``NAME{option=value,...}``, joined by commas. Items of a tuple are joined by ``|``; one item alone
may end in it. Characters that the grammar uses are written as in an URL (``%2C`` is a comma).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_type_hints
from urllib.parse import quote, unquote

from pydantic import TypeAdapter, ValidationError

from onnx_lathe.passes.cleanup.cleanup import Cleanup
from onnx_lathe.passes.fuse.attention import FuseAttention
from onnx_lathe.passes.fuse.flatten import FlattenTokens
from onnx_lathe.passes.fuse.foreign import OptimizeOnnxruntime, OptimizeOnnxscript
from onnx_lathe.passes.fuse.gelu import Gelu
from onnx_lathe.passes.fuse.masks import FoldMasks
from onnx_lathe.passes.fuse.merge import MergeProjections
from onnx_lathe.passes.fuse.normalization import FuseNormalization
from onnx_lathe.passes.fuse.padding import DropPadding
from onnx_lathe.passes.fuse.rotary import FuseRotary
from onnx_lathe.passes.fuse.skip import KeepSkipApart
from onnx_lathe.passes.fuse.slices import PushSlices
from onnx_lathe.passes.fuse.transposes import MoveTransposes
from onnx_lathe.passes.options import kind
from onnx_lathe.passes.precision.widen import Widen
from onnx_lathe.passes.prune.request import Prune
from onnx_lathe.passes.prune.sparsify import Sparsify
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.quantize.weight_only import QuantizeWeights
from onnx_lathe.passes.repair.adaround import RoundWeights
from onnx_lathe.passes.repair.correct import CorrectBiases
from onnx_lathe.passes.repair.equalize import Equalize
from onnx_lathe.passes.repair.smooth import Smooth
from onnx_lathe.passes.request import Request
from onnx_lathe.runtime.errors import PassSpecError

PASSES: Mapping[str, type[Request]] = {
    request.name: request
    for request in (
        *(Cleanup, Prune, Sparsify, QuantizeStatic, QuantizeDynamic, QuantizeWeights, Widen),
        *(FoldMasks, FuseAttention, FuseRotary, FuseNormalization, Gelu, MergeProjections, MoveTransposes),
        *(PushSlices, FlattenTokens, DropPadding, KeepSkipApart, OptimizeOnnxscript, OptimizeOnnxruntime),
        *(Equalize, Smooth, CorrectBiases, RoundWeights),
    )
}

PLAIN = "/:._-+()[]@"
"""What stands for itself in the value of an option, beside letters and digits."""
_PASS = re.compile(r"\s*([A-Za-z0-9_-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def parse(text: str) -> tuple[Request, ...]:
    """Return the requests that ``text`` spells, such as ``prune{ratio=0.3},quantize-dynamic``.

    Raises:
        PassSpecError: The grammar is broken, or a pass, an option or a value is unknown.
    """
    requests: list[Request] = []
    position = 0
    while position < len(text) or not requests:
        match = _PASS.match(text, position)
        if match is None:
            raise PassSpecError(
                "passes",
                got=repr(text[position:]),
                expected="PASS or PASS{option=value,...}, joined by commas",
                mend="`lathe passes` shows every pass with its options.",
            )
        requests.append(build(match[1], _options(match[1], match[2] or "")))
        position = match.end()
    return tuple(requests)


def build(name: str, options: Mapping[str, Any]) -> Request:
    """Return the request called ``name`` with ``options``, which may still be text.

    Raises:
        PassSpecError: The pass, an option or a value is unknown.
    """
    if name not in PASSES:
        raise PassSpecError(
            f"pass {name!r}",
            got="an unknown pass",
            expected=f"one of {', '.join(PASSES)}",
            mend=_suggest(name, PASSES),
        )
    request = PASSES[name]
    fields = {field.name: field for field in dataclasses.fields(_as_dataclass(request))}
    for key in options:
        if key not in fields:
            raise PassSpecError(
                f"{name}{{{key}}}",
                got="an unknown option",
                expected=f"one of {', '.join(fields) or '(none: this pass has no options)'}",
                mend=_suggest(key, fields),
            )
    try:
        values = {key: _typed(fields[key], value) for key, value in options.items()}
        return TypeAdapter(request).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else name
        raise PassSpecError(
            f"{name}{{{key}}}",
            got=repr(first["input"]),
            expected=str(first["msg"]).removeprefix("Input should be "),
            mend="`lathe passes` shows every pass with its options.",
        ) from None


@dataclass(frozen=True)
class Option:
    """An option of a pass: its name, what values it takes, and its default, as text."""

    name: str
    kind: str
    default: str


@dataclass(frozen=True)
class Entry:
    """A pass as `lathe passes` shows it."""

    name: str
    summary: str
    options: tuple[Option, ...]


def catalogue() -> tuple[Entry, ...]:
    """Return every pass with its options."""
    entries: list[Entry] = []
    for name, request in PASSES.items():
        hints = get_type_hints(request, include_extras=True)
        options = tuple(
            Option(field.name, kind(hints[field.name]), _shown(field.default))
            for field in dataclasses.fields(_as_dataclass(request))
        )
        entries.append(Entry(name, (request.__doc__ or "").strip().split("\n")[0], options))
    return tuple(entries)


def _shown(default: Any) -> str:
    """Return a default as the command line takes it; what cannot be spelled there is "none"."""
    if default is None or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else _text(default)


def spell(requests: Request | Sequence[Request]) -> str:
    """Return the text that `parse` turns back into ``requests``; options at their default are left out."""
    if isinstance(requests, Request):
        requests = (requests,)
    return ",".join(_spell(request) for request in requests)


def to_json(request: Request) -> dict[str, Any]:
    """Return ``{"pass": name, option: value, ...}`` with every option."""
    return {"pass": request.name, **dataclasses.asdict(_as_dataclass(request))}


def _spell(request: Request) -> str:
    changed: list[str] = []
    for field in dataclasses.fields(_as_dataclass(type(request))):
        value = getattr(request, field.name)
        if value != field.default:
            changed.append(f"{field.name}={_text(value)}")
    return request.name + (f"{{{','.join(changed)}}}" if changed else "")


def _options(name: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = item.partition("=")
        if not sign or not value:
            raise PassSpecError(
                f"{name}{{{item}}}",
                got="an option without a value",
                expected="option=value",
                mend=f"Write {name}{{{key}=...}}.",
            )
        items = [unquote(part.strip()) for part in value.split("|")]
        options[key.strip()] = tuple(filter(None, items)) if "|" in value else items[0]
    return options


def _text(value: Any) -> str:
    """Return an option's value as `_options` reads it."""
    if isinstance(value, tuple):
        items = [quote(str(item), safe=PLAIN) for item in cast("tuple[Any, ...]", value)]
        return "|".join(items) + ("|" if len(items) < 2 else "")
    return quote(str(value), safe=PLAIN)


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return text as its field takes it where pydantic would not: one item of a tuple, a whole number to choose."""
    if not isinstance(value, str):
        return value
    if isinstance(field.default, tuple):
        return (value,)
    return int(value) if re.fullmatch(r"-?[0-9]+", value) else value


def _as_dataclass(request: Any) -> Any:
    """Return a request as what dataclasses' own functions take (every concrete request is a dataclass)."""
    return request


def _suggest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else "`lathe passes` shows every pass with its options."
