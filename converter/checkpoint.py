"""What a training goes on from after an interruption, on as many processes as before or on others.

The state lies in a folder for each epoch: weights and optimizer in the format of ``torch.distributed.checkpoint``
(every process writes what it holds), all else as JSON. The folder appears under its name only when it is complete. The
index of that format is a pickle, which can run code as it is read: these files go from one run to the next of one
user. What others are given is weights in safetensors.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load  # pyright: ignore[reportUnknownVariableType]
from torch.distributed.checkpoint.state_dict_saver import save  # pyright: ignore[reportUnknownVariableType]

from onnx_lathe.converter import distributed
from onnx_lathe.runtime.errors import TrainingError

_NOTES = "training.json"
_PREFIX, _PART = "epoch-", ".part"
_DAMAGES = (OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, CheckpointException)


@dataclass
class TrainingState:
    """Everything that a training goes on from.

    Attributes:
        network: What is trained.
        optimizer: Of its parameters.
        scheduler: Of the learning rate.
        about: What tells this training from others.
        losses: Of the epochs done.
        scores: Of the epochs done.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    about: str
    losses: list[float] = field(default_factory=list[float])
    scores: list[float] = field(default_factory=list[float])

    def save(self, folder: Path) -> None:
        """Write the state after an epoch, whole or not at all, and drop that of the epoch before."""
        final = folder / f"{_PREFIX}{len(self.losses)}"
        part = final.with_name(f"{final.name}{_PART}")
        distributed.led(lambda: _empty(part))
        _alone(lambda: save(self._tensors(), checkpoint_id=part))
        notes = {
            "about": self.about,
            "weights": self._shapes(),
            "scheduler": self.scheduler.state_dict(),
            "losses": self.losses,
            "scores": self.scores,
        }

        def finish() -> None:
            (part / _NOTES).write_text(json.dumps(notes))
            os.replace(part, final)
            for other in folder.iterdir():
                if other != final:
                    shutil.rmtree(other)

        distributed.led(finish)

    def restore(self, folder: Path) -> None:
        """Go on from the last epoch that was saved, if one was.

        Raises:
            TrainingError: It is of another training, or damaged.
        """
        try:
            latest = distributed.led(lambda: _latest(folder))
            if latest is None:
                return
            notes: Mapping[str, Any] = distributed.led(lambda: json.loads((latest / _NOTES).read_text()))
            if notes["about"] != self.about:
                raise ValueError(f"that training had {notes['about']}")
            if notes["weights"] != self._shapes():
                raise ValueError("that network had other weights")
            tensors = self._tensors()
            # The optimizer has no state of parameters that were never used.
            partial = DefaultLoadPlanner(allow_partial_load=True)
            _alone(lambda: load(tensors, checkpoint_id=latest, planner=partial))
        except _DAMAGES as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise TrainingError(
                str(folder),
                got=f"a checkpoint that this training cannot go on from ({reason})",
                expected=f"one of a training with {self.about}",
                mend="Delete the folder to start afresh.",
            ) from error
        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=tensors["network"],
            optim_state_dict=tensors["optimizer"],
        )
        self.scheduler.load_state_dict(dict(notes["scheduler"]))
        self.losses, self.scores = notes["losses"], notes["scores"]

    def _tensors(self) -> dict[str, Any]:
        network, optimizer = get_state_dict(self.network, self.optimizer)
        return {"network": network, "optimizer": optimizer}

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.network.named_parameters()}


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _latest(folder: Path) -> Path | None:
    if not folder.exists():
        return None
    done = [path for path in folder.iterdir() if path.suffix != _PART]
    return max(done, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)


def _alone(call: Callable[[], object]) -> None:
    """Call without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            call()
        except CheckpointException as error:
            # torch wraps an interruption as it wraps every failure.
            if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
                raise KeyboardInterrupt from None
            raise
