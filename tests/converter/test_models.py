from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onnx_lathe.converter.models.build import build, fold_batchnorm, start
from onnx_lathe.converter.models.perceptron import Perceptron
from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.recipe import NetworkOptions
from onnx_lathe.converter.weights import save_weights
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import RecipeError

SMALL = {"channels": 1, "classes": 10, "widths": [4, 8], "blocks": 1}


def residual(**changes: Any) -> NetworkOptions:
    return NetworkOptions(network="residual", options=SMALL | changes)


def trained_batchnorms(network: nn.Module) -> nn.Module:
    """Give each BatchNorm statistics and weights that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return network.eval()


@pytest.mark.parametrize("size", [8, 32])
def test_a_residual_network_takes_images_of_any_size(size: int) -> None:
    network = build(residual(widths=[4, 8, 12], blocks=2), seed=0).eval()
    assert isinstance(network, ResidualNetwork)
    assert network(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert network.blocks(torch.zeros(2, 4, size, size)).shape == (2, 12, size // 4, size // 4)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    # The stem, two for each of 2 x 3 blocks, and a projection where each of two stages begins.
    assert len(convolutions) == 1 + 12 + 2


def test_a_perceptron_has_a_block_for_each_hidden_layer() -> None:
    network = build(NetworkOptions(network="perceptron", options={"widths": [6, 8, 4, 3]}), seed=0)
    assert isinstance(network, Perceptron)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items() if name.endswith("weight")}
    assert shapes == {"blocks.0.0.weight": (8, 6), "blocks.1.0.weight": (4, 8), "head.weight": (3, 4)}
    x = torch.randn(5, 6)
    hidden = network.blocks(x)
    assert (hidden >= 0).all()
    assert torch.equal(network(x), network.head(hidden))
    linear = build(NetworkOptions(network="perceptron", options={"widths": [6, 3]}), seed=0)
    assert sum(parameter.numel() for parameter in linear.parameters()) == 6 * 3 + 3


def test_the_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, same, other = (build(residual(), seed).state_dict()["head.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_network_of_a_module_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\ndef make(width):\n    return nn.Linear(width, 2)\ndef wrong(**anything):\n    return 3\n"
    )
    network = build(NetworkOptions(network="own_network:make", options={"width": 3}), 0, tmp_path)
    assert network.state_dict()["weight"].shape == (2, 3)
    with pytest.raises(RecipeError, match=r"'own_network:wrong': got a int, expected a torch\.nn\.Module"):
        build(NetworkOptions(network="own_network:wrong", options={"any": 1}), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            NetworkOptions(network="residula"),
            r"network: got 'residula', expected one of residual.* Did you mean 'residual'\?",
        ),
        (residual(width=[4]), r"network 'residual': options\.width: got an unknown option.* Did you mean 'widths'\?"),
        (residual(widths=[4, 0]), r"options\.widths\.1: got 0, expected greater than or equal to 1"),
        (residual(widths=[]), r"options\.widths: got \[\]"),
        (residual(blocks="many"), r"options\.blocks: got 'many', expected a valid integer"),
        (
            NetworkOptions(network="perceptron", options={"widths": [4]}),
            r"options\.widths: got \[4\], expected .*2 items",
        ),
        (NetworkOptions(network="residual"), r"options\.channels: got no such option.* Add 'channels' to the options"),
    ],
)
def test_wrong_options_are_named(options: NetworkOptions, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(options, seed=0)


def test_folding_keeps_the_outputs_and_the_names() -> None:
    network = trained_batchnorms(build(residual(), seed=0))
    images = torch.randn(3, 1, 8, 8)
    before, names = network(images).detach(), set(network.state_dict())
    folded = fold_batchnorm(network)
    assert folded is network
    # The same float32 products, rounded once more while folding.
    torch.testing.assert_close(folded(images), before, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    kept = set(folded.state_dict())
    assert {name for name in kept if name.endswith("weight")} <= names
    assert kept - names == {name.replace("weight", "bias") for name in kept if "0.weight" in name}


def test_a_subject_runs_one_inference_in_torch(tmp_path: Path) -> None:
    network = trained_batchnorms(build(residual(), seed=3))
    images = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    save_weights(network, tmp_path / "weights")
    tensors.save_npz(tmp_path / "feeds.npz", {"image": images})
    infer = start(residual().model_dump(), str(tmp_path / "weights"), str(tmp_path / "feeds.npz"), threads=None)
    logits = infer()
    assert isinstance(logits, torch.Tensor)
    assert logits.is_inference()
    torch.testing.assert_close(logits, network(torch.from_numpy(images)), rtol=1e-5, atol=1e-5)
