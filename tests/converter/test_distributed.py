"""Two processes over gloo do what one does. One pair of them plays all scenarios, because starting torch takes long."""

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onnx_lathe.converter import distributed
from onnx_lathe.converter.convert import train as train_recipe
from onnx_lathe.converter.distill import distill
from onnx_lathe.converter.distributed import Strategy, blocks, joined
from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.recipe import DistillationOptions, TrainingOptions
from onnx_lathe.converter.train import TrainingCurve, predict, score, train
from onnx_lathe.converter.weights import load_weights, save_weights
from onnx_lathe.runtime.errors import TrainingError
from onnx_lathe.runtime.samples import Samples

STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")
# float32 sums in another order, over some dozen steps.
TOLERANCE = 1e-5
OPTIONS = TrainingOptions(epochs=4, batch_size=65, learning_rate=1e-2, shift=1)


def images() -> Samples:
    """Return 130 images, two batches of 65, which two processes cannot halve; their class is the row that is bright."""
    generator = np.random.default_rng(0)
    labels = np.arange(130) % 3
    pixels = 0.5 * generator.standard_normal((130, 1, 6, 6)).astype(np.float32)
    pixels[np.arange(130), 0, 2 * labels] += 1.0
    return Samples(({"image": pixels},), labels, "images")


def numbers() -> Samples:
    """Return vectors in two shapes, one of a single sample, which leaves a process without any; labels ``[n, 2]``."""
    generator = np.random.default_rng(1)
    batches = tuple({"x": generator.standard_normal((count, size, 4)).astype(np.float32)} for count, size in SHAPES)
    sums = np.concatenate([batch["x"].mean(axis=1) for batch in batches])
    return Samples(batches, np.stack([sums.sum(axis=1), np.tanh(sums[:, 0])], axis=1), "numbers")


SHAPES = ((31, 3), (1, 2))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(112, 3)
    )


class Pooled(nn.Module):
    """Blocks and weights of its own, over a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head((x * self.scale).mean(1))


def normalized() -> nn.Module:
    return ResidualNetwork(channels=1, classes=3, widths=[4, 8], blocks=1)


def classes(strategy: Strategy, **changes: Any) -> tuple[nn.Module, TrainingCurve]:
    network = seeded(convolutional)
    options = OPTIONS.model_copy(update=changes)
    return network, train(network, images(), images(), options, seed=3, strategy=strategy)


def regression(strategy: Strategy) -> tuple[nn.Module, TrainingCurve]:
    """Distil, so that the teacher is at work as well."""
    network, teacher = seeded(Pooled), seeded(Pooled, seed=1)
    options = TrainingOptions(epochs=12, batch_size=8, learning_rate=1e-2, loss="mse", optimizer="adam")
    curve = distill(
        network, teacher, numbers(), numbers(), options, DistillationOptions(alpha=0.2), seed=2, strategy=strategy
    )
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    return network, curve


def interrupted(strategy: Strategy, folder: Path) -> None:
    """Leave a checkpoint after two of four epochs."""

    def interrupt(done: int, total: int, text: str) -> None:
        if text.startswith("epoch 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            *(seeded(convolutional), images(), images(), OPTIONS),
            seed=3,
            strategy=strategy,
            checkpoint=folder,
            progress=interrupt,
        )
    assert [path.name for path in folder.iterdir()] == ["epoch-2"]


def resumed(strategy: Strategy, folder: Path) -> tuple[nn.Module, TrainingCurve]:
    network, epochs = seeded(convolutional), set[str]()
    curve = train(
        *(network, images(), images(), OPTIONS),
        seed=3,
        strategy=strategy,
        checkpoint=folder,
        progress=lambda done, total, text: epochs.add(text[:7]),
    )
    assert epochs == {"epoch 3", "epoch 4", "trained"}
    assert not folder.exists()
    return network, curve


def diverging(strategy: Strategy) -> str:
    """Train where the loss is not finite on one process alone."""

    def loss(outputs: Tensor, labels: Tensor, inputs: object) -> Tensor:
        return outputs.mean() * (float("nan") if distributed.rank() == 1 else 1.0)

    with pytest.raises(TrainingError) as caught:
        train(seeded(convolutional), images(), images(), OPTIONS, seed=0, loss=loss, strategy=strategy)
    return str(caught.value)


def batch_normalized(strategy: Strategy) -> tuple[nn.Module, TrainingCurve, list[str]]:
    """Train in bf16, where BatchNorm needs care, and return what was told as well."""
    network, told = seeded(normalized), list[str]()
    curve = train(
        *(network, images(), images(), OPTIONS.model_copy(update={"precision": "bf16"})),
        seed=3,
        strategy=strategy,
        progress=lambda done, total, text: told.append(text),
    )
    return network, curve, told


def play(rank: int, port: int, folder: Path) -> None:
    """Play all scenarios on one of two processes, and write down what each gave."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    warnings.simplefilter("error")
    # True of every Linear over three dimensions, and no harm unless the network then changes its output in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}

    def keep(name: str, network: nn.Module, curve: TrainingCurve) -> None:
        save_weights(network, folder / name)
        found[name] = asdict(curve)

    with joined():
        for strategy in STRATEGIES:
            keep(f"classes {strategy}", *classes(strategy))
            keep(f"recomputed {strategy}", *classes(strategy, recompute=True))
            keep(f"bf16 {strategy}", *classes(strategy, precision="bf16"))
            keep(f"regression {strategy}", *regression(strategy))
            keep(f"resumed on two {strategy}", *resumed(strategy, folder / f"left by one, {strategy}"))
            interrupted(strategy, folder / f"left by two, {strategy}")
            found[f"diverging {strategy}"] = diverging(strategy)
            network, curve, told = batch_normalized(strategy)
            keep(f"curve of normalized {strategy}", network, curve)
            found[f"normalized {strategy}"] = told
            found[f"buffers {strategy}"] = [float(buffer.sum()) for buffer in network.buffers()]
            found[f"predicted {strategy}"] = predict(network, images()).tolist()
            found[f"sharded {strategy}"] = distributed.is_sharded(network)
            found[f"score {strategy}"] = score(network, images())
    (folder / f"{rank}.json").write_text(json.dumps(found))


Played = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Return a folder of weights by scenario, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("played")
    for strategy in STRATEGIES:
        interrupted(strategy, folder / f"left by one, {strategy}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(play, (port, folder), nprocs=2)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def same(network: nn.Module, curve: TrainingCurve, played: Played, name: str) -> None:
    """Assert that two processes came to the losses, scores and weights of one."""
    folder, found = played
    assert found[0][name] == found[1][name]
    assert found[0][name]["loss"] == pytest.approx(curve.loss, rel=TOLERANCE)
    assert found[0][name]["score"] == pytest.approx(curve.score, rel=TOLERANCE)
    other = seeded(lambda: type(network)() if isinstance(network, Pooled) else convolutional(), seed=9)
    load_weights(other, folder / name)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unequal_shares_train_as_one_process_does(strategy: Strategy, played: Played) -> None:
    network, curve = classes("ddp")
    assert curve.score[-1] > 0.6
    same(network, curve, played, f"classes {strategy}")
    same(network, curve, played, f"recomputed {strategy}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_without_a_sample_goes_along(strategy: Strategy, played: Played) -> None:
    network, curve = regression("ddp")
    assert curve.score[-1] > 0.3
    same(network, curve, played, f"regression {strategy}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_one_goes_on_on_two_and_the_reverse(strategy: Strategy, played: Played) -> None:
    network, curve = classes("ddp")
    same(network, curve, played, f"resumed on two {strategy}")
    again, resumed_curve = resumed("ddp", played[0] / f"left by two, {strategy}")
    assert resumed_curve.loss == pytest.approx(curve.loss, rel=TOLERANCE)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_learns_on_two_processes(strategy: Strategy, played: Played) -> None:
    _, curve = classes("ddp")
    losses = played[1][0][f"bf16 {strategy}"]["loss"]
    assert losses == pytest.approx(curve.loss, rel=0.1)
    assert losses != pytest.approx(curve.loss, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_processes_see_the_loss_that_is_not_finite(strategy: Strategy, played: Played) -> None:
    for found in played[1]:
        assert found[f"diverging {strategy}"].startswith("epoch 1, batch 1: got a loss of nan, expected a finite loss.")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_statistics_are_told_of_and_end_the_same_everywhere(strategy: Strategy, played: Played) -> None:
    first, second = played[1]
    assert first[f"normalized {strategy}"][0] == "BatchNorm on CPUs: each process takes the statistics of its own share"
    for name in ("buffers", "predicted", "score"):
        assert first[f"{name} {strategy}"] == second[f"{name} {strategy}"]
    right = np.argmax(first[f"predicted {strategy}"], axis=1) == images().labels
    assert first[f"score {strategy}"] == pytest.approx(right.mean())
    assert first[f"sharded {strategy}"] == (strategy == "fsdp")


def test_blocks_are_declared_or_found() -> None:
    pooled, residual = Pooled(), normalized()
    assert blocks(pooled) == list(pooled.blocks)
    assert blocks(residual) == [*residual.stem, *residual.blocks]
    pooled.fsdp_blocks = [pooled.head]
    assert blocks(pooled) == [pooled.head]


OWN = """
from torch import nn

def network(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
"""
RECIPE = """
name = "tiny"

[data]
source = "digits"

[distributed]
strategy = "fsdp"

[teacher]
network = "own_networks:network"
options = { width = 24 }
training = { epochs = 2, batch_size = 65, learning_rate = RATE }

[student]
network = "own_networks:network"
options = { width = 8 }
training = { epochs = 1, batch_size = 65 }
"""


def torchrun(folder: Path, verb: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "onnx_lathe.converter"]
    return subprocess.run(
        [sys.executable, *command, verb, "tiny.toml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def write(folder: Path, rate: str) -> None:
    (folder / "own_networks.py").write_text(OWN)
    (folder / "tiny.toml").write_text(RECIPE.replace("RATE", rate))


def test_torchrun_trains_a_recipe_that_one_process_finds_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1e-3")
    done = torchrun(tmp_path, "train")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["schema"] == "onnx-lathe/train/1"
    assert done.stderr.count("teacher: trained 2 epochs") == 1
    monkeypatch.chdir(tmp_path)
    found = train_recipe(Path("tiny.toml"))
    assert found["teacher"]["skipped"]
    assert list(found["teacher"]["result"].loss) == result["teacher"]["result"]["loss"]
    alone = train_recipe(Path("tiny.toml"), Path("alone"))
    assert alone["teacher"]["result"].loss == pytest.approx(found["teacher"]["result"].loss, rel=TOLERANCE)


def test_torchrun_ends_with_the_error_of_all(tmp_path: Path) -> None:
    write(tmp_path, "1e30")
    done = torchrun(tmp_path, "train")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert (result["error"], result["exit_status"]) == ("TrainingError", 2)
    assert result["message"] in done.stderr
    assert "rank      : 0 (local_rank: 0)\n  exitcode  : 2" in done.stderr
    assert "onnx_lathe/converter/train.py" not in done.stderr
