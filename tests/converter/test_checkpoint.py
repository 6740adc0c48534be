"""What a training goes on from: whole epochs of its own, or nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from onnx_lathe.converter import checkpoint as checkpoints
from onnx_lathe.converter.recipe import TrainingOptions
from onnx_lathe.converter.train import TrainingCurve, train
from onnx_lathe.runtime.errors import TrainingError
from onnx_lathe.runtime.samples import Samples

OPTIONS = TrainingOptions(epochs=3, batch_size=16, learning_rate=1e-2)
SAMPLES = Samples(({"x": np.random.default_rng(0).standard_normal((48, 4)).astype(np.float32)},), np.arange(48) % 3)


class Network(nn.Module):
    """Has a parameter that nothing uses, of which an optimizer keeps no state."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def run(folder: Path, *, seed: int = 1, width: int = 5, until: str = "never") -> TrainingCurve:
    """Train up to a report of the progress."""

    def interrupt(done: int, total: int, text: str) -> None:
        if text.startswith(until):
            raise KeyboardInterrupt

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(width)
    return train(network, SAMPLES, SAMPLES, OPTIONS, seed, checkpoint=folder, progress=interrupt)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """Return what a training left that was interrupted after two epochs."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "left", until="epoch 3")
    return tmp_path / "left"


def test_it_goes_on_where_it_stopped(left: Path, tmp_path: Path) -> None:
    assert [path.name for path in left.iterdir()] == ["epoch-2"]
    assert run(left) == run(tmp_path / "other")
    assert not left.exists()


def test_an_epoch_that_was_not_written_whole_does_not_count(
    left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "replace", broken)
        with pytest.raises(KeyboardInterrupt):
            run(left)
    assert sorted(path.name for path in left.iterdir()) == ["epoch-2", "epoch-3.part"]
    assert run(left) == run(tmp_path / "other")


def of_other_seed(folder: Path) -> dict[str, int]:
    return {"seed": 2}


def of_other_network(folder: Path) -> dict[str, int]:
    return {"width": 6}


def without_notes(folder: Path) -> dict[str, int]:
    (folder / "epoch-2" / "training.json").unlink()
    return {}


def with_wrong_notes(folder: Path) -> dict[str, int]:
    (folder / "epoch-2" / "training.json").write_text("{")
    return {}


def with_wrong_index(folder: Path) -> dict[str, int]:
    (folder / "epoch-2" / ".metadata").write_bytes(b"not an index")
    return {}


def with_wrong_tensors(folder: Path) -> dict[str, int]:
    (folder / "epoch-2" / "__0_0.distcp").write_bytes(b"short")
    return {}


def a_file(folder: Path) -> dict[str, int]:
    shutil.rmtree(folder)
    folder.write_bytes(b"not a folder")
    return {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_other_seed, r'that training had .*"seed": 1.*expected .*"seed": 2'),
        (of_other_network, "that network had other weights"),
        (without_notes, r"No such file or directory: .*training\.json"),
        (with_wrong_notes, "Expecting property name"),
        (with_wrong_index, "."),
        (with_wrong_tensors, "."),
        (a_file, "Not a directory"),
    ],
)
def test_what_it_cannot_go_on_from_is_refused(
    change: Callable[[Path], dict[str, int]], reason: str, left: Path
) -> None:
    message = rf"left: got a checkpoint that this training cannot go on from \(.*{reason}.*Delete the folder"
    with pytest.raises(TrainingError, match=message):
        run(left, **change(left))


def test_an_interruption_while_writing_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise CheckpointException("writing", {0: (KeyboardInterrupt(), StackSummary())})

    monkeypatch.setattr(checkpoints, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
