"""Where forms are compared: the original, or two of the blocks that it repeats; and whether it can be judged at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lathe.converter.compile.build import defect
from onnx_lathe.converter.compile.home import answers
from onnx_lathe.converter.compile.task import Task
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.passes import blocks
from onnx_lathe.runtime.errors import LatheError, OutputError
from onnx_lathe.runtime.parity import relative_error

_WORTH = 0.6
"""The share of a model's nodes that two of its blocks may be at most, for a comparison on them to save much."""
_SAME = 1e-3
"""Two runs on the same input may differ so much, relative to the largest value: sums in another order."""
_CODE = (
    "onnx_lathe.passes",
    "onnx_lathe.runtime",
    "onnx_lathe.converter.compile.arena",
    "onnx_lathe.converter.compile.home",
)
_MODEL = "model.onnx"


@dataclass(frozen=True)
class Arena:
    """The model that forms are made of to be compared.

    Attributes:
        model: Its file.
        notes: What that means for the figures, a sentence each.
    """

    model: Path
    notes: tuple[str, ...] = ()


def arena(task: Task) -> Arena:
    """Return two blocks of a network that repeats them, where that runs on the same inputs; else the original."""
    if not task.axes:
        return Arena(task.original)

    def make(folder: Path) -> float:
        try:
            share = blocks.write_shortened(task.original, folder / _MODEL)
            if share is None:
                return 1.0
            answers(task, folder / _MODEL, task.home)
        except OutputError:
            raise
        except LatheError:  # it is a convenience: what cannot be shortened is compared whole
            return 1.0
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - told and logged: it must not cost the rest
            defect("shortening a network that repeats", error)
            return 1.0
        return share

    depends = {
        "model": model_digest(task.original),
        "dims": [dict(dims) for dims in task.dims],
        "samples": task.samples_digest,
        "home": task.home,
    }
    stage = task.cache.stage("shorten", task.original_name, depends, _CODE, make, float)
    share = stage.value
    if share > _WORTH:
        return Arena(task.original)
    note = (
        f"Forms were compared on a network with {blocks.KEPT} of the blocks that this one repeats, "
        f"{100 * share:.0f} % of its nodes; what came out best was made whole and measured again."
    )
    return Arena(stage.folder / _MODEL, (note,))


def random_answer(task: Task) -> str | None:
    """Return that the original answers the same input differently each time, so that nothing can be judged by it.

    Raises:
        LatheError: The original cannot be run, or not on these inputs.
    """
    first, second = answers(task, task.original, task.home, times=2)
    for name, one in first.items():
        other = second[name]
        same = relative_error(one, other) <= _SAME if one.dtype.kind == "f" else np.array_equal(one, other)
        if not same:
            return (
                f"The original's output {name} differs from run to run on the same input: nothing can be judged by it."
            )
    return None
