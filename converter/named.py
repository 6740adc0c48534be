"""``module:callable``: the user's own Python, run only where a recipe names it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx_lathe.runtime.errors import RecipeError


def load_callable(spec: str, where: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import what ``module:callable`` names.

    Args:
        spec: A module, dotted perhaps, and a name in it.
        where: The recipe key, for messages.
        folder: A folder whose modules can be named besides the installed ones, which win. It stays on the
            import path, as the module may import its neighbours later.

    Raises:
        RecipeError: There is no such module or no such callable in it.
    """
    module_name, _, name = spec.partition(":")
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(
            where,
            got=f"{spec!r}, whose import fails: {error}",
            expected="module:callable of an importable module",
            mend=f"Put {module_name.partition('.')[0]}.py beside the recipe, or install the module.",
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise RecipeError(
            where,
            got=f"{spec!r}, but {module_name} has no callable {name!r}",
            expected="module:callable",
            mend="Correct the name.",
        )
    return found
