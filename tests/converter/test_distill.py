import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from onnx_lathe.converter.distill import distill, distillation_loss, regression_distillation_loss
from onnx_lathe.converter.recipe import DistillationOptions, TrainingOptions
from onnx_lathe.converter.train import predict
from onnx_lathe.runtime.errors import RecipeError
from onnx_lathe.runtime.samples import Samples

GENERATOR = np.random.default_rng(0)
STUDENT, TEACHER = GENERATOR.standard_normal((2, 6, 5)) * 3
LABELS = np.array([0, 4, 2, 2, 1, 3])


def by_hand(temperature: float, alpha: float) -> float:
    """Equations of arXiv:1503.02531, section 2, in float64."""
    hard = -log_softmax(STUDENT, axis=1)[np.arange(6), LABELS].mean()
    target = softmax(TEACHER / temperature, axis=1)
    soft = (target * (np.log(target) - log_softmax(STUDENT / temperature, axis=1))).sum(axis=1).mean()
    return float((1 - alpha) * hard + alpha * temperature**2 * soft)


def in_torch(temperature: float, alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
    student, teacher = (torch.tensor(logits, dtype=dtype) for logits in (STUDENT, TEACHER))
    return distillation_loss(student, teacher, torch.tensor(LABELS), temperature, alpha)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_the_paper(temperature: float, alpha: float) -> None:
    # float32 against float64: T^2 times a difference of logarithms near 1.
    assert in_torch(temperature, alpha).item() == pytest.approx(by_hand(temperature, alpha), rel=1e-4)


def test_the_loss_is_computed_in_float32_whatever_the_logits_are() -> None:
    loss = in_torch(4.0, 0.9, torch.bfloat16)
    assert loss.dtype == torch.float32
    # bfloat16 logits up to 10 have steps of 1/32.
    assert loss.item() == pytest.approx(by_hand(4.0, 0.9), rel=0.05)


def gradient(temperature: float) -> NDArray[np.float64]:
    student = torch.tensor(STUDENT, dtype=torch.float32, requires_grad=True)
    distillation_loss(student, torch.tensor(TEACHER), torch.tensor(LABELS), temperature, alpha=1.0).backward()
    assert student.grad is not None
    return student.grad.numpy().astype(np.float64)


def test_at_high_temperature_the_gradient_matches_logits_whatever_the_temperature() -> None:
    # Equation 4: dC/dz = (z - v) / (N T^2) for logits of zero mean, times T^2; averaged over the batch.
    centred = (STUDENT - STUDENT.mean(axis=1, keepdims=True)) - (TEACHER - TEACHER.mean(axis=1, keepdims=True))
    expected = centred / 5 / len(LABELS)
    largest = np.abs(expected).max()
    # The next term of the expansion falls as 1/T; float32 loses the logarithms' differences as T^2 grows.
    assert np.abs(gradient(100.0) - expected).max() < 0.05 * largest
    assert np.abs(gradient(200.0) - expected).max() < 0.03 * largest


def linear(seed: int, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(4, classes)


SAMPLES = Samples(({"x": GENERATOR.standard_normal((32, 4)).astype(np.float32)},), np.arange(32) % 3)
OPTIONS = TrainingOptions(epochs=40, batch_size=16, learning_rate=0.1)


def centred(network: nn.Module) -> NDArray[np.float32]:
    """Return logits of zero mean: a constant added to all classes changes no answer."""
    logits = predict(network, SAMPLES)
    return logits - logits.mean(axis=1, keepdims=True)


def test_the_student_learns_the_teachers_answers_and_the_teacher_nothing() -> None:
    student, teacher = linear(0), linear(1)
    before = teacher.weight.detach().clone()
    far = np.abs(centred(student) - centred(teacher)).mean()
    curve = distill(student, teacher, SAMPLES, SAMPLES, OPTIONS, DistillationOptions(alpha=1.0), seed=0)
    assert np.abs(centred(student) - centred(teacher)).mean() < 0.1 * far
    assert len(curve.loss) == 40
    assert torch.equal(teacher.weight, before)
    assert teacher.weight.grad is None
    assert not teacher.training


def test_the_teacher_sees_the_augmented_images() -> None:
    pixels = np.arange(8 * 16, dtype=np.float32).reshape(8, 1, 4, 4)
    samples = Samples(({"image": pixels},), np.zeros(8, np.int64))
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    class Recorder(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.head = nn.Linear(16, 2)
            self.name = name

        def forward(self, image: Tensor) -> Tensor:
            if self.name == "teacher" or self.training:
                seen[self.name].append(image)
            return self.head(image.flatten(1))

    options = TrainingOptions(epochs=1, batch_size=8, shift=1)
    distill(Recorder("student"), Recorder("teacher"), samples, samples, options, DistillationOptions(), seed=0)
    assert len(seen["student"]) == 1
    assert torch.equal(seen["student"][0], seen["teacher"][-1])
    assert not torch.equal(seen["student"][0].sort(dim=0).values, torch.from_numpy(pixels))


def test_label_smoothing_is_that_of_the_cross_entropy() -> None:
    student = torch.tensor(STUDENT)
    smooth = distillation_loss(student, student, torch.tensor(LABELS), 4.0, 0.0, label_smoothing=0.1).item()
    hard = -log_softmax(STUDENT, axis=1)
    expected = (0.9 * hard[np.arange(6), LABELS] + 0.1 * hard.mean(axis=1)).mean()
    assert smooth == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_numbers_is_a_mean_of_squares_by_hand() -> None:
    student, teacher, labels = (torch.tensor(GENERATOR.standard_normal((6, 2))) for _ in range(3))
    loss = regression_distillation_loss(student, teacher.bfloat16(), labels, 0.75)
    expected = 0.25 * ((student - labels) ** 2).mean() + 0.75 * ((student - teacher) ** 2).mean()
    assert loss.dtype == torch.float32
    # bfloat16 has 8 bits.
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_a_student_learns_the_teachers_numbers() -> None:
    student, teacher = linear(0), linear(1)
    samples = Samples(SAMPLES.batches, np.zeros((32, 3)))
    options = OPTIONS.model_copy(update={"loss": "mse"})
    far = np.abs(predict(student, samples) - predict(teacher, samples)).mean()
    distill(student, teacher, samples, samples, options, DistillationOptions(alpha=1.0), seed=0)
    assert np.abs(predict(student, samples) - predict(teacher, samples)).mean() < 0.1 * far


def test_teacher_and_student_must_have_the_same_outputs() -> None:
    with pytest.raises(
        RecipeError, match=r"student\.options: got outputs of shape \[3\] a sample, expected \[4\], as the teacher has"
    ):
        distill(linear(0), linear(0, classes=4), SAMPLES, SAMPLES, OPTIONS, DistillationOptions(), seed=0)
