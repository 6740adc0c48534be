from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onnx_lathe.benchmarks.metrics import r2
from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.recipe import TrainingOptions
from onnx_lathe.converter.train import predict, score, train
from onnx_lathe.runtime.errors import RecipeError, SamplesError, TrainingError
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


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_network_learns() -> None:
    trained, samples = network(), images()
    curve = train(trained, samples, samples, OPTIONS.model_copy(update={"epochs": 8, "shift": 0}), seed=0)
    assert (len(curve.loss), len(curve.score)) == (8, 8)
    assert curve.loss[-1] < 0.5 * curve.loss[0]
    assert curve.score[-1] == score(trained, samples) == 1.0
    assert predict(trained, samples).shape == (48, 3)
    assert not trained.training


@pytest.mark.parametrize(("optimizer", "columns"), [("adam", ()), ("adamw", (2,))])
def test_numbers_are_learnt_by_their_squared_error(optimizer: str, columns: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((64, 4)).astype(np.float32)
    labels = (x @ generator.standard_normal((4, *columns))).astype(np.float64)
    samples = Samples(({"x": x},), labels, "numbers")
    layers = [nn.Linear(4, 2)] if columns else [nn.Linear(4, 1), nn.Flatten(0)]
    options = TrainingOptions(epochs=60, batch_size=16, learning_rate=0.05, loss="mse", optimizer=optimizer)
    told: list[str] = []
    trained = nn.Sequential(*layers)
    curve = train(trained, samples, samples, options, seed=0, progress=lambda done, total, text: told.append(text))
    assert curve.score[-1] == score(trained, samples) == pytest.approx(r2(predict(trained, samples), labels))
    assert curve.score[-1] > 0.99
    assert told[-1].endswith(f"R2 {curve.score[-1]:.3f}")


def test_recomputing_activations_changes_no_weight() -> None:
    plain, recomputed = DropoutNetwork(), DropoutNetwork()
    options = [OPTIONS.model_copy(update={"recompute": recompute}) for recompute in (False, True)]
    curves = [
        train(trained, images(), images(), option, seed=1)
        for trained, option in zip((plain, recomputed), options, strict=True)
    ]
    assert curves[0] == curves[1]
    assert equal(plain, recomputed)
    assert "forward" not in vars(recomputed.layers[0])


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
    reached = f"loss {curve.loss[-1]:.3f}, {100 * curve.score[-1]:.1f} % correct"
    assert told[-1] == (9, 9, f"trained 3 epochs, {reached}")


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


class PairNetwork(nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image, image


VECTORS = Samples(({"x": np.ones((4, 36), np.float32)},), np.arange(4) % 3, "vectors")


@pytest.mark.parametrize(
    ("trained", "samples", "error", "message"),
    [
        (network(), Samples(images().batches), SamplesError, "got no labels, expected a class for each sample"),
        (
            network(),
            Samples(images().batches, np.zeros(48)),
            SamplesError,
            r"got float64 labels \[48\], expected a class .*train with loss = 'mse'",
        ),
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
