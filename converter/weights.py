"""Weights in files: safetensors, which holds nothing that runs."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from onnx_lathe.converter import distributed
from onnx_lathe.runtime.errors import ModelFileError
from onnx_lathe.runtime.staged import staged


def save_weights(network: nn.Module, path: Path) -> None:
    """Write all parameters and buffers as safetensors, whole or not at all.

    Every process must call it; the leading one writes, and holds the whole network in memory for that.
    """
    state = distributed.gathered(network)

    def write() -> None:
        # Cloned, because safetensors refuses tensors that share memory, and strides other than the usual.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        with staged(path) as part:
            safetensors.torch.save_file(copies, part)

    distributed.led(write)


def load_weights(network: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote into ``network``.

    Raises:
        ModelFileError: The file is missing, damaged, or holds the weights of another network.
    """
    try:
        network.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise ModelFileError(
            str(path), got="no such file", expected="weights (safetensors)", mend="Check the path."
        ) from None
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ModelFileError(
            str(path),
            got=f"a file that does not load ({str(error).splitlines()[0]})",
            expected="the weights of this network",
            mend="Build the network with the options that the weights were trained with.",
        ) from error
