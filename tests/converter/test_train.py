from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.recipe import TrainingOptions
from onnx_lathe.converter.train import accuracy, load_weights, predict, save_weights, shifted, train
from onnx_lathe.runtime.errors import ModelFileError, RecipeError, SamplesError, TrainingError
from onnx_lathe.runtime.samples import Samples

OPTIONS = TrainingOptions(epochs=3, batch_size=16, learning_rate=1e-2, shift=1)


def images(count: int = 48, classes: int = 3) -> Samples:
    """Return images whose class is the row that is bright."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % classes
    pixels = 0.1 * generator.standard_normal((count, 1, 6, 6)).astype(np.float32)
    pixels[np.arange(count), 0, 2 * labels] += 1.0
    return Samples(({"image": pixels},), labels, "images")


def network(classes: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResidualNetwork(channels=1, classes=classes, widths=[4, 8], blocks=1)


def weights(trained: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trained.state_dict().items()}


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_network_learns() -> None:
    trained, samples = network(), images()
    curve = train(trained, samples, samples, OPTIONS.model_copy(update={"epochs": 8, "shift": 0}), seed=0)
    assert (len(curve.loss), len(curve.accuracy)) == (8, 8)
    assert curve.loss[-1] < 0.5 * curve.loss[0]
    assert curve.accuracy[-1] == accuracy(trained, samples) == 1.0
    assert predict(trained, samples).shape == (48, 3)
    assert not trained.training


def test_training_depends_on_the_seed_alone() -> None:
    one, same, other = network(), network(), network()
    before = torch.get_rng_state()
    curves = [train(net, images(), images(), OPTIONS, seed) for net, seed in ((one, 5), (same, 5), (other, 6))]
    assert torch.equal(before, torch.get_rng_state())
    assert curves[0] == curves[1] != curves[2]
    assert equal(one, same)
    assert not equal(one, other)


class DropoutNetwork(nn.Module):
    """Draws random numbers while it trains, which a resumed training must draw again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


@pytest.mark.parametrize("make", [network, DropoutNetwork])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(make: type[nn.Module], tmp_path: Path) -> None:
    whole, cut = make(), make()
    checkpoint = tmp_path / "checkpoint"
    calls: list[tuple[int, int]] = []

    def interrupt(done: int, total: int, text: str) -> None:
        calls.append((done, total))
        if text.startswith("epoch 3"):
            raise KeyboardInterrupt

    curve = train(whole, images(), images(), OPTIONS, seed=1)
    with pytest.raises(KeyboardInterrupt):
        train(cut, images(), images(), OPTIONS, seed=1, checkpoint=checkpoint, progress=interrupt)
    assert calls == [(step, 9) for step in range(7)]
    fresh = make()
    assert train(fresh, images(), images(), OPTIONS, seed=1, checkpoint=checkpoint) == curve
    assert equal(fresh, whole)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_with_what_was_reached() -> None:
    told: list[tuple[int, int, str]] = []
    curve = train(network(), images(), images(), OPTIONS, seed=0, progress=lambda *report: told.append(report))
    assert [done for done, _, _ in told] == list(range(10))
    assert told[0] == (0, 9, "epoch 1 of 3")
    reached = f"loss {curve.loss[-1]:.3f}, {100 * curve.accuracy[-1]:.1f} % correct"
    assert told[-1] == (9, 9, f"trained 3 epochs, {reached}")


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"

    def interrupt(done: int, total: int, text: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), images(), images(), OPTIONS, seed=1, checkpoint=checkpoint, progress=interrupt)
    with pytest.raises(TrainingError, match=r'that training had .*"seed": 1.*expected .*"seed": 2.*Delete the file'):
        train(network(), images(), images(), OPTIONS, seed=2, checkpoint=checkpoint)
    with pytest.raises(TrainingError, match=r"cannot go on from \(Error\(s\) in loading state_dict.*Delete the file"):
        train(DropoutNetwork(), images(), images(), OPTIONS, seed=1, checkpoint=checkpoint)
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match=r"a checkpoint that this training cannot go on from .*Delete the file"):
        train(network(), images(), images(), OPTIONS, seed=1, checkpoint=checkpoint)


@pytest.mark.parametrize(("precision", "mend"), [("fp32", r"\)\."), ("bf16", r"\), or train in fp32\.")])
def test_a_loss_that_is_not_finite_stops_the_training(precision: str, mend: str) -> None:
    steps: list[int] = []

    def loss(logits: Tensor, labels: Tensor, inputs: object) -> Tensor:
        steps.append(len(labels))
        return logits.sum() * (float("nan") if len(steps) == 5 else 1.0)

    options = OPTIONS.model_copy(update={"precision": precision})
    message = rf"epoch 2, batch 2: got a loss of nan, expected a finite loss. Lower learning_rate \(now 0\.01{mend}"
    with pytest.raises(TrainingError, match=message):
        train(network(), images(), images(), options, seed=0, loss=loss)


def test_bf16_trains_too() -> None:
    curve = train(network(), images(), images(), OPTIONS.model_copy(update={"precision": "bf16"}), seed=0)
    assert np.isfinite(curve.loss).all()


class MeanNetwork(nn.Module):
    """Takes a sequence of any length and its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head((tokens * mask[:, :, None]).sum(1))


def test_batches_of_different_shapes_and_several_inputs() -> None:
    batches = tuple(
        {"tokens": np.ones((count, length, 4), np.float32), "mask": np.ones((count, length), np.float32)}
        for count, length in ((5, 3), (7, 2))
    )
    samples = Samples(batches, np.arange(12) % 2)
    sizes: list[tuple[int, int]] = []

    def loss(logits: Tensor, labels: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        sizes.append((len(labels), inputs[0].shape[1]))
        return logits.sum()

    train(MeanNetwork(), samples, samples, TrainingOptions(epochs=1, batch_size=4), seed=0, loss=loss)
    assert sorted(sizes) == [(2, 3), (3, 2), (3, 3), (4, 2)]


def test_shifted_images_are_translations_that_repeat_the_edge() -> None:
    torch.manual_seed(0)
    originals = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).repeat(20, 1, 1, 1)
    moved = shifted(originals, 2)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    seen: set[tuple[int, int]] = set()
    for before, after in zip(originals, moved, strict=True):
        padded = nn.functional.pad(before, (2, 2, 2, 2), mode="replicate")
        matches = {
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(padded[:, row : row + 4, column : column + 5], after)
        }
        assert len(matches) == 1
        seen |= matches
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(5))
    assert shifted(originals, 0) is originals


def test_weights_go_to_a_file_and_back(tmp_path: Path) -> None:
    trained, fresh = network(), network()
    train(trained, images(), images(), OPTIONS, seed=0)
    save_weights(trained, tmp_path / "weights.safetensors")
    assert not equal(trained, fresh)
    load_weights(fresh, tmp_path / "weights.safetensors")
    assert equal(trained, fresh)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"absent: got no such file, expected weights \(safetensors\)"):
        load_weights(network(), tmp_path / "absent")
    save_weights(network(classes=4), tmp_path / "four")
    with pytest.raises(ModelFileError, match=r"does not load \(Error\(s\) in loading state_dict for ResidualNetwork"):
        load_weights(network(), tmp_path / "four")
    (tmp_path / "four").write_bytes(b"garbage")
    with pytest.raises(ModelFileError, match=r"a file that does not load \(Error while deserializing header"):
        load_weights(network(), tmp_path / "four")


class PairNetwork(nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image, image


VECTORS = Samples(({"x": np.ones((4, 36), np.float32)},), np.arange(4) % 3, "vectors")


@pytest.mark.parametrize(
    ("trained", "samples", "error", "message"),
    [
        (network(), Samples(images().batches), SamplesError, "got no labels, expected a class for each sample"),
        (network(), Samples(images().batches, np.zeros(48)), SamplesError, "got float64 labels"),
        (network(2), images(), SamplesError, "got classes 0 to 2, expected 0 to 1: the network has 2 classes"),
        (nn.Linear(36, 3), VECTORS, RecipeError, r"training\.shift: got 1 with the inputs x float32 \[2, 36\]"),
        (nn.Conv2d(3, 3, 1), images(), RecipeError, r"does not take the samples .*takes image float32 \[2, 1, 6, 6\]"),
        (PairNetwork(), images(), RecipeError, "got an output tuple, expected one tensor of logits"),
        (nn.Flatten(), images(), RecipeError, "got a network without weights to train"),
        (nn.Identity(), images(), RecipeError, r"got an output \[2, 1, 6, 6\], expected one tensor of logits"),
        (nn.Identity(), Samples(({"text": np.array(["a"])},), np.zeros(1, int)), SamplesError, "text: got strings"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    trained: nn.Module, samples: Samples, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(trained, samples, samples, OPTIONS, seed=0)
