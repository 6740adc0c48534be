import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from onnx_lathe.benchmarks.metrics import r2
from onnx_lathe.converter.objective import Classification, Regression, objective_for, objective_of
from onnx_lathe.converter.recipe import TrainingOptions
from onnx_lathe.runtime.errors import RecipeError, SamplesError
from onnx_lathe.runtime.samples import Samples

GENERATOR = np.random.default_rng(0)


def samples(labels: np.ndarray | None) -> Samples:
    return Samples(({"x": np.zeros((6, 1), np.float32)},), labels, "six")


@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_the_score_of_numbers_is_r2_by_variance(shape: tuple[int, ...]) -> None:
    labels = GENERATOR.standard_normal(shape)
    outputs = labels + 0.5 * GENERATOR.standard_normal(shape)
    objective = Regression()
    # In two parts, as two processes would.
    errors = objective.errors(outputs[:20], labels[:20]) + objective.errors(outputs[20:], labels[20:])
    found = objective.score(errors, labels)
    assert found == pytest.approx(r2_score(labels, outputs, multioutput="variance_weighted"))
    assert found == pytest.approx(r2(outputs, labels))
    assert objective.score(objective.errors(-outputs, labels), labels) == 0.0


def test_labels_that_do_not_vary_are_met_or_not() -> None:
    labels, objective = np.ones(4), Regression()
    assert objective.score(objective.errors(labels, labels), labels) == 1.0
    assert objective.score(objective.errors(labels + 1.0, labels), labels) == 0.0


def test_the_score_of_classes_is_the_share_of_right_ones() -> None:
    outputs, labels = np.eye(5), np.array([0, 1, 2, 0, 0])
    objective = Classification()
    assert objective.score(objective.errors(outputs, labels), labels) == 0.6
    assert objective.spell(0.6) == "60.0 % correct"


def test_labels_tell_what_they_are_for() -> None:
    assert isinstance(objective_for(samples(np.zeros(6))), Regression)
    assert isinstance(objective_for(samples(np.zeros(6, np.uint8))), Classification)
    assert objective_of(TrainingOptions(epochs=1, label_smoothing=0.1)) == Classification(0.1)
    assert objective_of(TrainingOptions(epochs=1, loss="mse")) == Regression()


@pytest.mark.parametrize(
    ("objective", "labels", "message"),
    [
        (Classification(), None, "six: label: got no labels, expected a class for each sample, as integers"),
        (Classification(), np.zeros(6), r"got float64 labels \[6\], .*Convert them, or train with loss = 'mse'"),
        (Classification(), np.zeros((6, 2), int), r"got int64 labels \[6, 2\], expected a class for each sample"),
        (Regression(), None, "got no labels, expected numbers for each sample, as floats"),
        (Regression(), np.zeros(6, int), r"got int64 labels \[6\], .*train with loss = 'cross_entropy'"),
    ],
)
def test_labels_of_another_kind_are_refused(
    objective: Classification | Regression, labels: np.ndarray | None, message: str
) -> None:
    with pytest.raises(SamplesError, match=message):
        objective.labels(samples(labels))


@pytest.mark.parametrize(
    ("labels", "outputs", "message"),
    [
        (np.zeros(6), torch.zeros(2, 1), r"got an output \[2, 1\], expected one tensor \[n\], as the labels"),
        (np.zeros((6, 2)), torch.zeros(2, 3), r"got an output \[2, 3\], expected one tensor \[n, 2\], as the labels"),
        (np.zeros(6), (torch.zeros(2),), r"got an output tuple, expected one tensor \[n\]"),
    ],
)
def test_outputs_must_have_the_shape_of_the_labels(labels: np.ndarray, outputs: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Regression().check(samples(labels), outputs)
