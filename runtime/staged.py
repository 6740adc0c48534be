"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: Path) -> Generator[Path]:
    """Give a place to write ``path`` at; nothing appears at ``path`` unless the block ends without an error.

    Files written beside the given place (the external weights of a model) move along.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        yield part
        for beside in Path(folder).iterdir():
            if beside != part:
                os.replace(beside, path.with_name(beside.name))
        # Last, because it is what makes the weights beside it valid.
        os.replace(part, path)
