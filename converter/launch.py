"""What a launcher of several processes, such as torchrun, tells each of them. Needs no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from onnx_lathe.runtime.errors import InputError

Led = Callable[[Callable[[], Any]], Any]
"""Calls a function on the leading process alone, and returns to every process what it returned."""

_GRACE_SECONDS = 10.0


def alone(function: Callable[[], Any]) -> Any:
    """Call the function: the one process leads."""
    return function()


def processes() -> int:
    """Return how many processes were launched together (torchrun's ``WORLD_SIZE``)."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return int(os.environ["RANK"]) if processes() > 1 else 0


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if processes() > 1 else 0


def leads() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return rank() == 0


def check_verb(verb: str) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        InputError: This is one of several processes, and ``verb`` is other than ``train`` and ``distill``.
    """
    if processes() > 1 and verb not in ("train", "distill"):
        raise InputError(
            f"lathe {verb}",
            got=f"{processes()} processes",
            expected="one: only train and distill are distributed",
            mend=f"Run lathe {verb} without torchrun; it finds what train and distill have done.",
        )


def give_way() -> None:
    """Wait to be ended by the launcher, which ends all when one fails: the leading process is to say why.

    Where it returns, nobody did.
    """
    time.sleep(_GRACE_SECONDS)
