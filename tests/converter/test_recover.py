import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from onnx_lathe.converter.export import export
from onnx_lathe.converter.models.build import fold_batchnorm
from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.recipe import DistillationOptions, ExportOptions, TrainingOptions
from onnx_lathe.converter.recover import recover
from onnx_lathe.converter.train import TrainingCurve, predict, train
from onnx_lathe.runtime.errors import OracleError, TrainingError, UnsupportedModelError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session

TRAINING = TrainingOptions(epochs=3, batch_size=16, learning_rate=1e-2)


def images() -> Samples:
    """Return images whose class is the row that is bright."""
    labels = np.arange(48) % 3
    pixels = 0.1 * np.random.default_rng(0).standard_normal((48, 1, 6, 6)).astype(np.float32)
    pixels[np.arange(48), 0, 2 * labels] += 1.0
    return Samples(({"image": pixels},), labels, "images")


def prune(model: ModelProto, kept: dict[str, tuple[int, list[int]]]) -> ModelProto:
    """Keep of each initializer named only some indices of an axis, as the pass `prune` does."""
    pruned = copy.deepcopy(model)
    for tensor in pruned.graph.initializer:
        if tensor.name in kept:
            axis, indices = kept[tensor.name]
            array = numpy_helper.to_array(tensor).take(indices, axis=axis)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    del pruned.graph.value_info[:]
    return pruned


CHANNELS = [0, 2, 3]
CUT = {
    "blocks.0.first.0.weight": (0, CHANNELS),
    "blocks.0.first.0.bias": (0, CHANNELS),
    "blocks.0.second.0.weight": (1, CHANNELS),
}


class Case:
    """A trained and folded network with its export, and the same graph with a channel cut."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        network = ResidualNetwork(channels=1, classes=3, widths=[4, 8], blocks=1)
        train(network, images(), images(), TRAINING.model_copy(update={"epochs": 8}), seed=0)
        self.network = fold_batchnorm(network)
        self.parameters = export(
            self.network, images().first(4).batches[0], folder / "dense.onnx", ExportOptions()
        ).parameters
        self.dense = onnx.load(folder / "dense.onnx")

    def recover(self, folder: Path, pruned: ModelProto, **changes: Any) -> TrainingCurve:
        onnx.save(pruned, folder / "pruned.onnx")
        arguments: dict[str, Any] = {
            "parameters": self.parameters,
            "network": self.network,
            "teacher": self.network,
            "samples": images(),
            "evaluate_on": images(),
            "options": TRAINING,
            "distillation": DistillationOptions(),
            "seed": 0,
        }
        return recover(folder / "pruned.onnx", folder / "out" / "model.onnx", **arguments | changes)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_the_pruned_weights_learn_and_keep_names_and_sizes(case: Case, tmp_path: Path) -> None:
    dense = {name: tensor.clone() for name, tensor in case.network.state_dict().items()}
    curve = case.recover(tmp_path, prune(case.dense, CUT))
    assert len(curve.loss) == 3
    assert curve.score[-1] == 1.0
    before, after = initializers(tmp_path / "pruned.onnx"), initializers(tmp_path / "out" / "model.onnx")
    assert {name: array.shape for name, array in before.items()} == {name: array.shape for name, array in after.items()}
    assert after["blocks.0.first.0.weight"].shape == (3, 4, 3, 3)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(case.parameters)
    assert all(torch.equal(dense[name], tensor) for name, tensor in case.network.state_dict().items())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]


def test_the_file_answers_as_the_curve_says(case: Case, tmp_path: Path) -> None:
    samples = images()
    curve = case.recover(tmp_path, prune(case.dense, CUT), options=TRAINING.model_copy(update={"epochs": 1}))
    logits = Session(tmp_path / "out" / "model.onnx").run(samples.batches[0])["logits"]
    assert (logits.argmax(axis=1) == samples.labels).mean() == curve.score[-1]


class Sequence(nn.Module):
    """Its first Linear reads three dimensions, so that the graph holds the transpose of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(tokens)).sum(1))


def test_transposed_weights_are_turned_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Sequence()
    tokens = np.random.default_rng(0).standard_normal((24, 5, 4)).astype(np.float32)
    samples = Samples(({"tokens": tokens},), np.arange(24) % 3)
    exported = export(network, samples.first(4).batches[0], tmp_path / "m.onnx", ExportOptions(input_names=("tokens",)))
    (name,) = (name for name, parameter in exported.parameters.items() if parameter.transposed)
    kept = {name: (1, [0, 2, 5]), "first.bias": (0, [0, 2, 5]), "head.weight": (1, [0, 2, 5])}
    onnx.save(prune(onnx.load(tmp_path / "m.onnx"), kept), tmp_path / "pruned.onnx")
    recover(
        tmp_path / "pruned.onnx",
        tmp_path / "model.onnx",
        exported.parameters,
        network=network,
        teacher=network,
        samples=samples,
        evaluate_on=samples,
        options=TrainingOptions(epochs=30, batch_size=8, learning_rate=0.03),
        distillation=DistillationOptions(alpha=1.0),
        seed=0,
    )
    assert initializers(tmp_path / "model.onnx")[name].shape == (4, 3)
    want = predict(network, samples)
    errors = {
        path: np.abs(Session(tmp_path / path).run(samples.batches[0])["logits"] - want).mean()
        for path in ("pruned.onnx", "model.onnx")
    }
    assert errors["model.onnx"] < 0.7 * errors["pruned.onnx"]


def test_weights_beside_the_graph_stay_there(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lathe.converter.recover.EXTERNAL_ABOVE_BYTES", 0)
    case.recover(tmp_path, prune(case.dense, CUT), options=TRAINING.model_copy(update={"epochs": 1}))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert Session(tmp_path / "out" / "model.onnx").run(images().batches[0])["logits"].shape == (48, 3)


def renamed(model: ModelProto) -> ModelProto:
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.name = "other"
    for node in model.graph.node:
        node.input[:] = ["other" if name == "head.bias" else name for name in node.input]
    return model


def halved(model: ModelProto) -> ModelProto:
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    model.graph.node.insert(0, helper.make_node("Cast", ["head.bias"], ["wide"], to=TensorProto.FLOAT))
    for node in model.graph.node[1:]:
        node.input[:] = ["wide" if name == "head.bias" else name for name in node.input]
    return model


def negated(model: ModelProto) -> ModelProto:
    for node in model.graph.node:
        node.output[:] = ["positive" if name == "logits" else name for name in node.output]
    model.graph.node.append(helper.make_node("Neg", ["positive"], ["logits"]))
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (renamed, UnsupportedModelError, r"pruned\.onnx: initializer 'head\.bias': got no such initializer"),
        (halved, UnsupportedModelError, r"initializer 'head\.bias': got other than float32"),
        (negated, OracleError, r"recovery of pruned\.onnx: got a relative error of .* between torch and the graph"),
    ],
)
def test_a_graph_that_is_not_only_pruned_is_refused(
    change: Callable[[ModelProto], ModelProto], error: type[Exception], message: str, case: Case, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        case.recover(tmp_path, change(prune(case.dense, CUT)))
    assert not (tmp_path / "out").exists()


def test_a_cut_weight_that_is_no_parameter_is_named(case: Case, tmp_path: Path) -> None:
    parameters = {name: parameter for name, parameter in case.parameters.items() if name != "blocks.0.first.0.weight"}
    message = r"initializer 'blocks\.0\.first\.0\.weight': got a network that cannot follow the pruned graph: .*size"
    with pytest.raises(UnsupportedModelError, match=message):
        case.recover(tmp_path, prune(case.dense, CUT), parameters=parameters)


def test_an_uncut_weight_that_is_no_parameter_stays_as_it_is(case: Case, tmp_path: Path) -> None:
    parameters = {name: parameter for name, parameter in case.parameters.items() if name != "stem.0.weight"}
    case.recover(tmp_path, prune(case.dense, CUT), parameters=parameters)
    before, after = initializers(tmp_path / "pruned.onnx"), initializers(tmp_path / "out" / "model.onnx")
    assert np.array_equal(before["stem.0.weight"], after["stem.0.weight"])
    assert not np.array_equal(before["stem.0.bias"], after["stem.0.bias"])


def test_nothing_is_written_where_training_fails(case: Case, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Lower learning_rate"):
        case.recover(tmp_path, prune(case.dense, CUT), options=TRAINING.model_copy(update={"learning_rate": 1e30}))
    assert not (tmp_path / "out").exists()
