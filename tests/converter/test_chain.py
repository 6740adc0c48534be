"""The stages of a recipe that learns numbers; those of classes are in test_convert.py."""

from pathlib import Path

import pytest

from onnx_lathe.converter.chain import MODEL, Chain
from onnx_lathe.converter.progress import silent
from onnx_lathe.converter.recipe import load_recipe

OWN = """
import numpy as np
from torch import nn

from onnx_lathe.runtime.samples import Samples

def samples():
    x = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    return Samples(({"x": x},), np.stack([np.tanh(x[:, 0] + x[:, 1]), x[:, 2]], axis=1), "own")

def network(width):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
"""
RECIPE = """
name = "numbers"

[data]
source = "own_numbers:samples"

[teacher]
network = "own_numbers:network"
options = { width = 64 }
training = { epochs = 15, batch_size = 32, learning_rate = 1e-2, loss = "mse" }

[student]
network = "own_numbers:network"
options = { width = 32 }
training = { epochs = 15, batch_size = 32, learning_rate = 1e-2, loss = "mse", optimizer = "adam", weight_decay = 0.0 }

[export]
input_names = ["x"]
output_names = ["y"]

[prune]
passes = "prune{ratio=0.5}"
recovery = { epochs = 15, batch_size = 32, learning_rate = 1e-2, loss = "mse" }

[compile]
metric = "r2"
"""


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    (tmp_path / "own_numbers.py").write_text(OWN)
    (tmp_path / "numbers.toml").write_text(RECIPE)
    return Chain(load_recipe(tmp_path / "numbers.toml"), tmp_path, tmp_path / "work", silent)


def test_numbers_go_through_every_stage(chain: Chain) -> None:
    curves = {curve.name: curve for curve in chain.story("lathe convert").curves}
    assert min(curves["teacher"].scores[-1], curves["student distilled"].scores[-1]) > 0.9
    recovered = chain.recovered
    assert recovered is not None
    assert recovered.value.score[-1] > 0.8
    assert (recovered.folder / MODEL).is_file()
    for scores in chain.distillation():
        assert scores.teacher is not None
        for interval in (scores.teacher, scores.alone, scores.distilled):
            assert 0.8 < interval.low <= interval.value <= interval.high <= 1.0
            assert interval.high - interval.low > 1e-4
    assert chain.task().metric == "r2"
