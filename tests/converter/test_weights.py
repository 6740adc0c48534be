from pathlib import Path

import pytest
import torch
from torch import nn

from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.weights import load_weights, save_weights
from onnx_lathe.runtime.errors import ModelFileError


def network(classes: int = 3) -> nn.Module:
    return ResidualNetwork(channels=1, classes=classes, widths=[4, 8], blocks=1)


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_go_to_a_file_and_back(tmp_path: Path) -> None:
    trained, fresh = network().to(memory_format=torch.channels_last), network()
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
