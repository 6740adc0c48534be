import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from onnx_lathe.converter.export import Exported, Parameter, export, match_parameters
from onnx_lathe.converter.models.build import fold_batchnorm
from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.recipe import ExportOptions
from onnx_lathe.runtime.errors import OracleError, RecipeError, UnsupportedModelError
from onnx_lathe.runtime.samples import Feeds
from onnx_lathe.runtime.session import Session

IMAGES: Feeds = {"image": np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)}
TOKENS: Feeds = {"tokens": np.arange(21).reshape(3, 7), "mask": np.ones((3, 7), np.float32)}


class TokenNetwork(nn.Module):
    """Its first Linear reads three dimensions, so that the exporter transposes and renames the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 8)
        self.first = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head((torch.relu(self.first(self.table(tokens))) * mask[:, :, None]).sum(1))


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Exported]:
    """A folded network, its file, and what the export found."""
    path = tmp_path_factory.mktemp("residual") / "model.onnx"
    network = fold_batchnorm(ResidualNetwork(channels=1, classes=10, widths=[4, 8], blocks=1))
    for parameter in network.parameters():
        # A fresh network has biases of zero, which the exporter drops.
        nn.init.normal_(parameter, std=0.1)
    return network, path, export(network, IMAGES, path, ExportOptions())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Exported]:
    path = tmp_path_factory.mktemp("tokens") / "model.onnx"
    network = TokenNetwork()
    options = ExportOptions(input_names=("ids", "attention"), output_names=("scores",), opset=21, external_above_mb=0)
    return network, path, export(network, TOKENS, path, options)


def initializers(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_names_opset_and_the_batch_are_as_asked(
    residual: tuple[nn.Module, Path, Exported], tokens: tuple[nn.Module, Path, Exported]
) -> None:
    session = Session(residual[1])
    assert [(spec.name, spec.shape) for spec in session.inputs] == [("image", ("batch", 1, 8, 8))]
    assert [(spec.name, spec.shape) for spec in session.outputs] == [("logits", ("batch", 10))]
    assert onnx.load(residual[1]).opset_import[0].version == 20
    session = Session(tokens[1])
    assert [(spec.name, spec.shape) for spec in session.inputs] == [("ids", ("batch", 7)), ("attention", ("batch", 7))]
    assert [spec.name for spec in session.outputs] == ["scores"]
    assert onnx.load(tokens[1]).opset_import[0].version == 21


@pytest.mark.parametrize("size", [1, 2, 4, 33])
def test_the_file_computes_what_torch_computes(residual: tuple[nn.Module, Path, Exported], size: int) -> None:
    network, path, exported = residual
    images = np.random.default_rng(size).standard_normal((size, 1, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        want = network(torch.from_numpy(images)).numpy()
    # The tolerance of the export itself: the same float32 products, added in another order.
    np.testing.assert_allclose(
        Session(path).run({"image": images})["logits"], want, rtol=0, atol=1e-4 * abs(want).max()
    )
    assert exported.error < 1e-5


def test_the_file_carries_no_trace_of_the_machine(residual: tuple[nn.Module, Path, Exported]) -> None:
    content = residual[1].read_bytes()
    for trace in (b"pkg.torch", b"stack_trace", b".py", b"site-packages", str(Path(torch.__file__).parent).encode()):
        assert trace not in content


def test_every_weight_of_a_folded_network_is_a_parameter(residual: tuple[nn.Module, Path, Exported]) -> None:
    network, path, exported = residual
    state = network.state_dict()
    assert {parameter.name for parameter in exported.parameters.values()} == set(state)
    for name, array in initializers(onnx.load(path)).items():
        if name in exported.parameters:
            parameter = exported.parameters[name]
            assert parameter == Parameter(name, transposed=False)
            assert np.array_equal(array, state[name].numpy())


def test_a_renamed_and_transposed_weight_is_found(tokens: tuple[nn.Module, Path, Exported]) -> None:
    network, path, exported = tokens
    weights = initializers(onnx.load(path))
    (name,) = (name for name, parameter in exported.parameters.items() if parameter.transposed)
    assert exported.parameters[name].name == "first.weight" != name
    assert np.array_equal(weights[name], network.state_dict()["first.weight"].numpy().T)
    assert {parameter.name for parameter in exported.parameters.values()} == set(network.state_dict())


def test_weights_that_cannot_be_told_apart_are_left_out() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.LayerNorm(5), nn.LayerNorm(5))
    state = {name: tensor.numpy(force=True) for name, tensor in network.state_dict().items()}
    graph = {
        "0.weight": state["0.weight"],
        "renamed": state["1.weight"].T,
        "ones": state["2.weight"],
        "0.bias": state["1.bias"],
        "unknown": np.full(7, 3.0, np.float32),
    }
    assert match_parameters(graph, network) == {
        "0.weight": Parameter("0.weight", transposed=False),
        "renamed": Parameter("1.weight", transposed=True),
        "0.bias": Parameter("1.bias", transposed=False),
    }


def test_weights_folded_by_the_exporter_are_absent(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 2))
    nn.init.constant_(network[1].weight, 2.0)
    exported = export(network, IMAGES, tmp_path / "model.onnx", ExportOptions())
    assert {parameter.name for parameter in exported.parameters.values()} == {"3.weight", "3.bias"}


def test_weights_lie_beside_the_graph_where_asked(
    residual: tuple[nn.Module, Path, Exported], tokens: tuple[nn.Module, Path, Exported]
) -> None:
    assert [path.name for path in residual[1].parent.iterdir()] == ["model.onnx"]
    assert sorted(path.name for path in tokens[1].parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    small = onnx.load(tokens[1], load_external_data=False)
    locations = {
        entry.value for tensor in small.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}


def test_an_export_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    feeds = {"x": np.ones((1, 4), np.float32)}
    # torch's loggers do not propagate to the root, where pytest listens.
    logging.getLogger("torch").addHandler(caplog.handler)
    try:
        export(nn.Linear(4, 2), feeds, tmp_path / "model.onnx", ExportOptions(input_names=("x",)))
    finally:
        logging.getLogger("torch").removeHandler(caplog.handler)
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_export_that_computes_something_else_writes_nothing(tmp_path: Path) -> None:
    class Wavering(nn.Module):
        """Another result each time: the graph holds the first."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, image: Tensor) -> Tensor:
            self.calls += 1
            return image.flatten(1) * float(self.calls)

    message = (
        r"export of Wavering: output 'logits' of a batch of \d: got a relative error of .* expected at most 0\.0001"
    )
    with pytest.raises(OracleError, match=message):
        export(Wavering(), IMAGES, tmp_path / "out" / "model.onnx", ExportOptions())
    assert list((tmp_path / "out").iterdir()) == []


class Fixed(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.reshape(4, 64)


class Branching(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image if image.sum() > 0 else -image


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            Fixed(),
            r"network Fixed: input 'image': got shape \[4,1,8,8\], expected a first dimension 'batch' of any size",
        ),
        (
            Branching(),
            r"network Branching: got an operation that torch cannot export \(Could not guard on data-dependent",
        ),
    ],
)
def test_a_network_that_cannot_be_exported_is_refused(network: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export(network, IMAGES, tmp_path / "model.onnx", ExportOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ExportOptions(input_names=("a", "b")),
            r"export\.input_names: got 2 names \(a, b\), expected 1, one for each of image",
        ),
        (ExportOptions(output_names=("a", "b")), r"export\.output_names: got 2 names \(a, b\), expected 1"),
    ],
)
def test_names_that_do_not_fit_are_refused(options: ExportOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        export(nn.Flatten(), IMAGES, tmp_path / "model.onnx", options)
