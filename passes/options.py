"""What values an option of a pass takes, in words."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
_BOUNDS = ((Gt, "gt", "over"), (Ge, "ge", "at least"), (Lt, "lt", "under"), (Le, "le", "at most"))


def kind(annotation: Any) -> str:
    """Return the values of a type, such as "4 or 8" or "a number over 0 and under 1"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [bound for each in arguments[1:] for bound in getattr(each, "metadata", [each])]
        return " ".join([kind(arguments[0]), " and ".join(filter(None, map(_bound, bounds)))]).strip()
    if origin is Literal:
        return _either([str(value).lower() if isinstance(value, bool) else str(value) for value in arguments])
    if origin in (Union, types.UnionType):
        return _either([kind(each) for each in arguments])
    if origin is tuple:
        return f"one or more of {kind(arguments[0])}, joined by |"
    return _PLAIN.get(annotation, str(annotation))


def _bound(bound: object) -> str:
    for type_, field, word in _BOUNDS:
        if isinstance(bound, type_):
            return f"{word} {getattr(bound, field):g}"
    return ""


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
