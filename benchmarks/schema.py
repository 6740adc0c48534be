"""Results as JSON that tells its schema and version; what has another one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from onnx_lathe.runtime.errors import InputError

T = TypeVar("T")


class Versioned:
    """Base of dataclasses that are kept as JSON with their schema and version."""

    SCHEMA: ClassVar[str]
    REMEDY: ClassVar[str] = "Measure again."
    """What to do where one cannot be read."""

    def to_json(self) -> str:
        """Return it as one line of JSON; `from_json` reads it."""
        return dump(self, self.SCHEMA)

    @classmethod
    def from_json(cls, text: str, source: str = "result") -> Self:
        """Read what `to_json` wrote.

        Args:
            text: The JSON.
            source: Where it comes from, for messages.

        Raises:
            InputError: It is not JSON, of another schema, or lacks something.
        """
        return load(cls, cls.SCHEMA, text, source, cls.REMEDY)


def dump(value: object, schema: str) -> str:
    """Return a dataclass as one line of JSON that begins with its schema.

    JSON has no infinity: an unbounded limit is the string ``"Infinity"``, which `load` reads back.
    """
    content = json.loads(to_json(value, inf_nan_mode="strings"))
    return json.dumps({"schema": schema, **content}, allow_nan=False)


def load(kind: type[T], schema: str, text: str, source: str, mend: str = "Measure again.") -> T:
    """Read what `dump` wrote.

    Args:
        kind: The dataclass.
        schema: The schema it must have.
        text: The JSON.
        source: Where it comes from, for messages.
        mend: What to do where it cannot be read.

    Raises:
        InputError: It is not JSON, of another schema, or lacks something.
    """
    return load_any({schema: kind}, text, source, mend)


def load_any(kinds: Mapping[str, type[T]], text: str, source: str, mend: str = "Measure again.") -> T:
    """Read what `dump` wrote of any of several dataclasses, ``kinds`` by their schemas; else as `load`."""
    expected = " or ".join(repr(schema) for schema in kinds)

    def unreadable(got: str) -> InputError:
        return InputError(source, got=got, expected=f"JSON of schema {expected}", mend=mend)

    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise unreadable(f"no JSON ({error})") from None
    found = cast("dict[str, Any]", content).pop("schema", None) if isinstance(content, dict) else None
    if not isinstance(found, str) or found not in kinds:
        raise unreadable(f"schema {found!r}")
    try:
        return TypeAdapter(kinds[found]).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise unreadable(f"{place}: {first['msg']}") from None
